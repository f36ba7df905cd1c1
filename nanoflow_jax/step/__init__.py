"""One compiled step: the layer program (`layer`), traced on arrays (`trace`), what it is given (`batch`, `slots`),
how it ends (`head`), and what rows may want after it (`extras`, `sampler`, `logprobs`)."""
