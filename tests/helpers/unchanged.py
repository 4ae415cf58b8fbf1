"""What a model was before, and that it is so again."""

import torch


def state(model):
    """Copies of all tensors by name, and all modules."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, list(model.modules())


def assert_untouched(model, before):
    """Neither values nor modules have changed, and no gradient, hook or patch is left."""
    tensors, modules = before
    assert list(model.modules()) == modules
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert not any("forward" in vars(module) for module in modules)
