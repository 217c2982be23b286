package balance

type Alias struct{ n int }

func NewAlias(weights []int) *Alias { return &Alias{len(weights)} }
func (a *Alias) Pick() int          { return 0 }
