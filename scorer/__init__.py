"""The scoring side: attacks, the adversarial difficulty measure, the worker loop."""
