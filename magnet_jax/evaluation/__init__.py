"""How good generated audio is: embedders, metrics, prompt lists, and the baselines beside them."""
