"""The training side: SAM, curriculum, score feed, sampler, loop."""
