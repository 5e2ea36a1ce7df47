"""MAGNeT: masked audio generation with one non-autoregressive transformer, in JAX."""
