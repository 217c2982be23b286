package balance

// reduced returns the weights divided by their greatest common divisor, and
// their sum. A negative weight counts as 0; if no weight is positive, all
// count as 1.
func reduced(weights []int) (shares []uint64, total uint64) {
	shares = make([]uint64, len(weights))
	var divisor uint64
	for i, w := range weights {
		shares[i] = uint64(max(w, 0))
		divisor = gcd(divisor, shares[i])
	}
	for i := range shares {
		if divisor == 0 {
			shares[i] = 1
		} else {
			shares[i] /= divisor
		}
		total += shares[i]
	}
	return shares, total
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
