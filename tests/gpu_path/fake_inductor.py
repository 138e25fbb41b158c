"""What Inductor would launch on a GPU that is not there: the kernels of a step, and their bytes.

The trainer's own forward and backward pass is traced on fake CPU tensors, where autograd runs, then
its graphs are moved to a GPU that exists in a description only, and scheduled: fused as they would
be, but not written as Triton code.

    python -m tests.gpu_path.fake_inductor      counts anew, and writes budget.json
"""

import json
import types
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, graph, ir, scheduler
from torch._inductor import config as inductor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import train_imagenet as recipe
from fast_imagenet.config import read_config
from tests.gpu_path.fake_gpu import GPU, batch, build_state, move

CPU = torch.device("cpu")
CONVOLUTION = "torch._C._conv_determine_backend_memory_format"  # cuDNN: as its inputs are
# an RTX 5060 Ti
PROPERTIES = types.SimpleNamespace(
    name="described",
    type="cuda",
    index=0,
    major=12,
    minor=0,
    multi_processor_count=36,
    total_memory=16 << 30,
    max_threads_per_multi_processor=1536,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    gcnArchName="",
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=101376,
    L2_cache_size=32 << 20,
    clock_rate=2_500_000,
    memory_clock_rate=14_000_000,
    memory_bus_width=128,
)


BUDGET = Path(__file__).with_name("budget.json")
FLAGS = ("--training.compile=on", "--training.precision=bf16", "--training.batch_size=256")
# With a repeated block in the first stage alone: a whole ResNet-50 is more of the same, and takes
# three times as long to count.
NETWORKS = {"resnet50": (Bottleneck, [2, 1, 1, 1]), "resnet18": (BasicBlock, [2, 1, 1, 1])}


def count(name: str) -> dict[str, dict[str, int]]:
    """What a step of 256 images of 160 px launches, with a network of NETWORKS: by direction."""
    cfg = read_config(recipe.SETTINGS, list(FLAGS), prog="", description="")
    with mock.patch.object(recipe, "create_model", return_value=ResNet(*NETWORKS[name])):
        forward, backward = step_graphs(cfg)
    return {
        "forward": launches_of(*forward, is_backward=False)._asdict(),
        "backward": launches_of(*backward, is_backward=True)._asdict(),
    }


def step_graphs(cfg, classes=1000):
    """The graphs of a compiled step, in order, each with its inputs: [(graph, inputs), ...]."""
    graphs = []

    def note(traced, inputs):
        graphs.append((traced, inputs))
        return make_boxed_func(traced.forward)

    def partition(joint, inputs, **options):
        joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, inputs, **options)

    backend = aot_autograd(
        fw_compiler=note,
        bw_compiler=note,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    compiler = torch.compile

    def compiled(module, **options):
        return compiler(module, **options | {"backend": backend})

    with ExitStack() as stack:
        for target, stand_in in {
            "torch.compile": compiled,
            CONVOLUTION: lambda *_: torch.channels_last,
            "train_imagenet.use_small_maps": lambda _: None,  # for CPUs
            "torch.nn.Module.to": move,
        }.items():
            stack.enter_context(mock.patch(target, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        state = build_state(cfg, CPU, classes)
        side = cfg.resolution.max_res
        recipe.forward_backward(state, batch(state.micro_batch, side, CPU), 0)
    return graphs


class Launches(NamedTuple):
    """Of a graph. Bytes: read and written, each tensor once per kernel."""

    kernels: int  # of Inductor's own, in Triton
    library: int  # calls of cuDNN, cuBLAS
    bytes: int


class ScheduledError(Exception):
    """All is known; code need not be written."""


def launches_of(traced, inputs, is_backward: bool) -> Launches:
    """What Inductor would launch for a graph, moved to the GPU."""
    found = []

    def schedule(lowering):
        lowering._update_scheduler()
        nodes = lowering.scheduler.nodes
        external = [n for n in nodes if isinstance(n, scheduler.ExternKernelSchedulerNode)]
        none = sum(isinstance(n, scheduler.NopKernelSchedulerNode) for n in nodes)
        kernels = len(nodes) - len(external) - none
        # the results of a call are entries of their own
        library = sum(not isinstance(n.node, ir.MultiOutput) for n in external)
        found.append(Launches(kernels, library, lowering.count_bytes()[0]))
        raise ScheduledError

    with ExitStack() as stack:
        stack.enter_context(mock.patch(CONVOLUTION, return_value=torch.channels_last))
        traced, moved, mode = moved_to_gpu(traced, inputs)
        described(stack)
        stack.enter_context(mock.patch.object(graph.GraphLowering, "compile_to_module", schedule))
        stack.enter_context(inductor.patch(fx_graph_cache=False, compile_threads=1))
        stack.enter_context(tracing(TracingContext(mode)))
        try:
            compile_fx.compile_fx_inner(
                traced, moved, static_input_idxs=[], is_backward=is_backward
            )
        except Exception:
            if not found:
                raise
    return found[0]


def moved_to_gpu(traced, inputs):
    """The graph and its inputs with tensors of the GPU, and the mode that these are fake in."""
    for node in traced.graph.nodes:
        if node.op == "call_function" and "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    traced.recompile()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)
            if isinstance(x, torch.Tensor)
            else x
            for x in inputs
        ]
        traced = make_fx(lambda *x: traced(*x), tracing_mode="real")(*moved)
    return traced, moved, mode


def described(stack):
    """Until the stack is closed, CUDA answers questions as if there were one GPU."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (12, 0),
        "get_device_properties": PROPERTIES,
        "_get_device_properties": PROPERTIES,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
        "_lazy_init": None,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name, answer in answers.items():
        stand_in = mock.patch.object(
            torch.cuda, name, lambda *_, answer=answer, **__: answer, create=True
        )
        stack.enter_context(stand_in)
    interface = {
        "is_available": True,
        "current_device": 0,
        "get_compute_capability": "120",
        "get_device_properties": PROPERTIES,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    for name, answer in interface.items():
        stand_in = staticmethod(lambda *_, answer=answer, **__: answer)
        stack.enter_context(mock.patch.object(CudaInterface, name, stand_in))
    worker = staticmethod(lambda *_: PROPERTIES)
    stack.enter_context(mock.patch.object(CudaInterface.Worker, "get_device_properties", worker))
    for module in (scheduler, torch.utils._triton):
        stack.enter_context(mock.patch.object(module, "has_triton", return_value=True))


if __name__ == "__main__":
    counts = {name: count(name) for name in NETWORKS}
    BUDGET.write_text(json.dumps({"torch": torch.__version__, **counts}, indent=2) + "\n")
    print(f"wrote {BUDGET}")
