"""What other people's models need now and then beside lora2.py: copy what you use."""
import contextlib

from torch import nn

from lora2 import LoRA2Linear, add_lora2, load_lora2_state_dict, lora2_layers, require


@contextlib.contextmanager
def adapters_off(model):
    """Within it every ΔW is 0: base against tuned, or DPO's reference model.

    What else was trained, such as a head, stays. Within it save, export and merge nothing: there is
    nothing. load_lora2_state_dict() would refuse such a file.
    """
    layers = [layer for _, layer in lora2_layers(model)]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales):
            layer.scale = scale


def rebuild(model, state, layer=LoRA2Linear):
    """Prepare and load a pretrained model from lora2_state_dict() alone. Returns the adapted names.

    model: the base, as it was before add_lora2(). Names, k, r, alpha and what trains beside the
    adapters are in the file. ValueError for a file without adapters or of another model.
    layer: as for add_lora2().
    """
    mark = ".base_sample"
    names = [key.removesuffix(mark) for key in state if key.endswith(mark)]
    there = dict(model.named_modules())
    strange = [name for name in names if name not in there]
    require(names and not strange, f"not in this model: {strange[:3]}, or no adapters in the file")
    k, r = state[f"{names[0]}.u"].shape
    alpha = r * state[f"{names[0]}.scale"].item()
    add_lora2(model, names, k, r, alpha, layer=layer)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:
            parameter.requires_grad_(True)
    load_lora2_state_dict(model, state)
    return names


def conv1d_to_linear(model):
    """Put an nn.Linear where GPT-2 has a Conv1D, whose weight is its transpose. Returns the model.

    The outputs stay, bit for bit or to rounding. For from_pretrained() transpose them back after
    merge_lora2(); lora2_state_dict() and peft's lora_A and lora_B are the same for both.
    """
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":  # transformers' own, y = x W + b
            d_in, d_out = module.weight.shape
            linear = nn.Linear(d_in, d_out, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model
