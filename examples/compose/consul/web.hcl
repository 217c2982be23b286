# The instances of the service "web". The addresses are the names of the
# containers, which Caddy and Consul resolve.

services {
  id      = "web-1"
  name    = "web"
  address = "web-1"
  port    = 80
  weights = { passing = 1, warning = 1 }

  checks = [{
    http     = "http://web-1:80/health"
    interval = "2s"
    timeout  = "1s"
  }]
}

services {
  id      = "web-2"
  name    = "web"
  address = "web-2"
  port    = 80
  weights = { passing = 3, warning = 1 }

  checks = [{
    http     = "http://web-2:80/health"
    interval = "2s"
    timeout  = "1s"
  }]
}
