package balance

type Rotation struct{ n int }

func NewRotation(weights []int) *Rotation { return &Rotation{len(weights)} }
func (r *Rotation) At(n uint64) int       { return int(n % uint64(r.n)) }
