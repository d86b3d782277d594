"""LoRA² with FSDP2: the frozen weights and the head are sharded, the adapters whole on every rank.

    torchrun --nproc_per_node=2 examples/in_fsdp2.py       # runs on CPUs, with gloo

The scores of the pruner compare all adapters, so these are left out of the sharding and their
gradients are averaged by hand; they are small. What follows from that:
- lora2_state_dict() gathers: call it on every rank. Its DTensors become tensors by full_tensor().
- merge_lora2() is for a model that is not sharded: load the file into one.
Tried on gloo with two processes only; not on GPUs, with mixed precision or CPU offload.
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import (RankPruner, add_lora2, load_lora2_state_dict, lora2_layers, lora2_state_dict,
                   orthogonality_loss)

T = 100


def make_model():
    """Three layers with random weights, always the same, in place of a pretrained model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                          nn.Linear(32, 1))
    add_lora2(model, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
    return model


def main():
    """Train on all processes, print, and return the loaded file and the pruner."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = make_model()
    adapters = []
    for _, layer in lora2_layers(model):
        adapters += [layer.v, layer.u, layer.lam, layer.U, layer.V]
        fully_shard(layer.base, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(adapters))
    trained = [p for p in model.parameters() if p.requires_grad]  # after sharding
    optimizer = torch.optim.AdamW(trained, lr=0.02, foreach=False)  # tensors and DTensors
    pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=10, final=40, interval=5)
    for step in range(T):
        x = torch.randn(64, 8)[rank::world]  # each process its rows of the same batch
        loss = nn.functional.mse_loss(model(x), torch.sin(2 * x[:, :1]))
        loss.backward()
        for parameter in adapters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        (0.1 * orthogonality_loss(model)).backward()  # afterwards: it is the same on all ranks
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()

    state = lora2_state_dict(model)  # on every rank
    for name, tensor in state.items():
        if isinstance(tensor, DTensor):
            state[name] = tensor.full_tensor()
    whole = make_model()
    load_lora2_state_dict(whole, state)
    x = torch.randn(1000, 8)
    same = torch.allclose(whole(x), model(x), atol=1e-5)
    error = nn.functional.mse_loss(whole(x), torch.sin(2 * x[:, :1])).item()
    if rank == 0:
        print(f"error {error:.2f}, kept {sum(pruner.kept().values())} of 8, loaded: {same}")
    dist.destroy_process_group()
    return whole, pruner


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
