"""LoRA² with FSDP2: the frozen weights and the head are sharded, the adapters whole on every rank.

    torchrun --nproc_per_node=2 examples/in_fsdp2.py       # runs on CPUs, with gloo

    loss 0.03, kept 2 of 8, loaded into a whole model: True

The pruner compares all adapters. So these are not sharded, and their gradients averaged by hand.
Tried with two processes on CPUs only; not on GPUs, in mixed precision or with offloading.
"""
import copy
import sys

import torch
from torch import distributed as dist, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import RankPruner, add_lora2, lora2_layers, lora2_state_dict, orthogonality_loss
from methods.hosts import rebuild

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
model = copy.deepcopy(base)
add_lora2(model, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
adapters = []
for _, layer in lora2_layers(model):
    adapters += layer.parameters(recurse=False)  # v, u, lam, U, V
    fully_shard(layer.base, mesh=mesh)
fully_shard(model, mesh=mesh, ignored_params=set(adapters))
trained = [p for p in model.parameters() if p.requires_grad]  # after sharding
optimizer = torch.optim.AdamW(trained, lr=0.02, foreach=False)  # tensors and DTensors
pruner = RankPruner(model, target_rank=1, total_steps=100, warmup=10, final=40, interval=5)
for _ in range(100):
    x = torch.randn(256, 8)[rank::world]  # each process its rows of the same batch
    loss = nn.functional.mse_loss(model(x), torch.sin(2 * x[:, :1]))
    loss.backward()
    for parameter in adapters:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world
    (0.1 * orthogonality_loss(model)).backward()  # afterwards: it is the same on all ranks
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()

state = lora2_state_dict(model)  # on every rank, since it gathers
for name, tensor in state.items():
    if hasattr(tensor, "full_tensor"):  # a DTensor
        state[name] = tensor.full_tensor()
rebuild(base, state)
same = torch.allclose(base(x), model(x), atol=1e-5)
if rank == 0:
    kept = sum(pruner.kept().values())
    print(f"loss {loss:.2f}, kept {kept} of 8, loaded into a whole model: {same}")
dist.barrier()  # all leave together
dist.destroy_process_group()
