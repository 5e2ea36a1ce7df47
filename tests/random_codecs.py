"""Small codecs with random weights."""

import json

from magnet_jax.io.torch_env import import_torch

SMALL = {
    "codebook_size": 32,
    "hidden_size": 12,
    "num_filters": 4,
    "num_residual_layers": 2,
    "sampling_rate": 1500,
    "target_bandwidths": [1.5],
    "upsampling_ratios": [5, 2, 3],
}
# Small codecs with random weights: each kind of padding, norm, trim and skip.
RANDOM = {
    "causal": {},
    "causal_trimmed": {"trim_right_ratio": 0.4, "use_conv_shortcut": False},
    "constant": {"use_causal_conv": False, "pad_mode": "constant", "compress": 1},
    "replicate": {"use_causal_conv": False, "pad_mode": "replicate", "last_kernel_size": 4},
    "like_48khz": {
        "audio_channels": 2,
        "norm_type": "time_group_norm",
        "normalize": True,
        "use_causal_conv": False,
    },
}


def save_random(folder, settings):
    torch = import_torch()
    from safetensors.torch import save_file
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig(**settings))
    for name, tensor in model.state_dict().items():
        if "codebook.embed" in name:
            torch.nn.init.normal_(tensor)
        elif "norm.weight" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        elif "norm.bias" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
