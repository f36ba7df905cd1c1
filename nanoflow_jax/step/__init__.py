"""One compiled step: the layer program (`layer`), traced on arrays (`trace`), what it is given (`batch`, `slots`), and
how it ends (`sampler`, `logprobs`)."""
