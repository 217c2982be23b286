# Caddy before a service, both run by Nomad, which registers them in Consul.
# Weights need Nomad 1.10 or later.
#
#     nomad job run -var caddy_image=example.com/caddy-consul:1 nomad.hcl
#
# The image is Caddy built with this plugin: see compose/Dockerfile.

variable "caddy_image" {
  type = string
}

job "web" {
  # The instances: three with the full weight, and one that tries a new version
  # with a tenth of that.
  group "stable" {
    count = 3

    network {
      port "http" { to = 80 }
    }

    service {
      name     = "web"
      port     = "http"
      provider = "consul"
      tags     = ["stable"]

      weights {
        passing = 10
        warning = 1
      }

      check {
        type     = "http"
        path     = "/health"
        interval = "5s"
        timeout  = "2s"
      }
    }

    # Deregistered first, stopped later: requests under way come to their end.
    shutdown_delay = "5s"

    task "web" {
      driver = "docker"
      config {
        image = "traefik/whoami"
        ports = ["http"]
      }
    }
  }

  group "canary" {
    count = 1

    network {
      port "http" { to = 80 }
    }

    service {
      name     = "web"
      port     = "http"
      provider = "consul"
      tags     = ["canary"]

      weights {
        passing = 1
        warning = 1
      }

      check {
        type     = "http"
        path     = "/health"
        interval = "5s"
        timeout  = "2s"
      }
    }

    shutdown_delay = "5s"

    task "web" {
      driver = "docker"
      config {
        image = "traefik/whoami"
        ports = ["http"]
      }
    }
  }

  group "caddy" {
    network {
      mode = "host"
      port "http" { static = 8080 }
    }

    service {
      name     = "caddy"
      port     = "http"
      provider = "consul"

      check {
        type     = "tcp"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "caddy" {
      driver = "docker"
      config {
        image        = var.caddy_image
        network_mode = "host"
        volumes      = ["local/Caddyfile:/etc/caddy/Caddyfile"]
      }

      # The agent of the machine. With ACLs, let Nomad give the task a token:
      # `consul {}` sets CONSUL_HTTP_TOKEN, which Caddy takes as it is.
      template {
        destination = "local/Caddyfile"
        data        = <<EOH
:8080 {
	reverse_proxy {
		dynamic consul web
		lb_policy consul_weighted_round_robin
		lb_retries 2
		fail_duration 10s
	}
}
EOH
      }
    }
  }
}
