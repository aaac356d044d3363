"""The peers of the inference benchmark, each driven as its own documentation advises.

Targets of `suanli.measure.isolation.Worker`: a class per peer with `check(path)` and
`block(batch, calls)`. They use the libraries directly, not Suanli's backends, so that a mistake in
those shows.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from suanli.workloads.resolve import resolve


class Peer:
    """A workload through one library.

    Args:
        workload: Reference of the workload.
        batch: Samples in a step.
        settings: The peer's own settings.
    """

    def __init__(self, workload: str, batch: int, **settings: Any) -> None:
        torch.manual_seed(0)
        self.workload = resolve(workload)
        self.model = self.workload.make_model().eval()
        self.inputs = self.workload.make_inputs(batch)
        self.settings = settings
        with torch.inference_mode():
            self.prepare()

    def prepare(self) -> None:
        raise NotImplementedError

    def call(self) -> Any:
        raise NotImplementedError

    def block(self, calls: int) -> list[float]:
        times = []
        with torch.inference_mode():
            for _ in range(calls):
                start = time.perf_counter_ns()
                self.call()
                times.append((time.perf_counter_ns() - start) / 1e6)
        return times

    def first_output(self, path: str) -> None:
        with torch.inference_mode():
            result = self.call()
        leaves = torch.utils._pytree.tree_leaves(result)
        save_file({"output": torch.as_tensor(np.array(leaves[0])).float().contiguous()}, path)


class Eager(Peer):
    """PyTorch eager: fp32, or bf16 by autocast or by casting the model."""

    def prepare(self) -> None:
        if self.settings.get("channels_last"):
            self.model = self.model.to(memory_format=torch.channels_last)
        if self.settings.get("cast"):
            self.model = self.model.bfloat16()
            self.inputs = _cast(self.inputs)
        if self.settings.get("compile"):
            self.model = torch.compile(self.model, **self.settings.get("compile_options", {}))

    def call(self) -> Any:
        if self.settings.get("autocast"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return _plain(self.model(*self.inputs.args, **self.inputs.kwargs))
        return _plain(self.model(*self.inputs.args, **self.inputs.kwargs))


class OnnxRuntime(Peer):
    """ONNX Runtime's CPU provider with all graph optimisations."""

    def prepare(self) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self.session = ort.InferenceSession(
            str(_onnx(self)), options, providers=["CPUExecutionProvider"]
        )
        names = [i.name for i in self.session.get_inputs()]
        arrays = [t.numpy() for t in _tensors(self.inputs)]
        self.feed = dict(zip(names, arrays, strict=True))

    def call(self) -> Any:
        return self.session.run(None, self.feed)


class OpenVino(Peer):
    """OpenVINO from PyTorch by `convert_model`, with the performance hint that its guide names."""

    def prepare(self) -> None:
        os.environ["OPENVINO_TELEMETRY_ENABLE"] = "0"
        import openvino as ov

        core = ov.Core()
        tensors = _tensors(self.inputs)
        example = self.inputs.kwargs or (
            self.inputs.args[0] if len(self.inputs.args) == 1 else self.inputs.args
        )
        exported = torch.export.export(
            self.model, tuple(self.inputs.args), dict(self.inputs.kwargs)
        )
        model = ov.convert_model(exported)
        del example
        if self.settings.get("int8"):
            import nncf

            data = self.workload.data
            assert data is not None
            samples = data().train.inputs[0][:300]
            per = tensors[0].shape[0]
            chunks = [samples[i : i + per] for i in range(0, len(samples) - per + 1, per)]
            model = nncf.quantize(model, nncf.Dataset(chunks, lambda t: t.numpy()))
        config = {
            "PERFORMANCE_HINT": self.settings["hint"],
            "INFERENCE_PRECISION_HINT": self.settings["precision"],
        }
        self.compiled = core.compile_model(model, "CPU", config)
        self.arrays = [t.numpy() for t in tensors]
        streams = int(self.settings.get("requests", 1))
        self.requests = [self.compiled.create_infer_request() for _ in range(streams)]
        if streams > 1:
            raise ValueError("several requests are the business of OpenVinoStreams")

    def call(self) -> Any:
        return list(self.requests[0].infer(self.arrays, share_inputs=True).values())


class OpenVinoStreams(OpenVino):
    """OpenVINO with as many streams as asked, the batch cut into equal parts."""

    def prepare(self) -> None:
        os.environ["OPENVINO_TELEMETRY_ENABLE"] = "0"
        import openvino as ov

        streams = int(self.settings["streams"])
        parts = int(self.settings.get("parts", streams))
        whole = _tensors(self.inputs)
        self.chunks = [
            [t.chunk(parts)[i].contiguous().numpy() for t in whole] for i in range(parts)
        ]
        share = self.workload.make_inputs(whole[0].shape[0] // parts)
        model = ov.convert_model(
            torch.export.export(self.model, tuple(share.args), dict(share.kwargs))
        )
        if self.settings.get("int8"):
            import nncf

            assert self.workload.data is not None
            samples = self.workload.load().train.inputs[0][:300]
            per = whole[0].shape[0] // parts
            chunks = [samples[i : i + per] for i in range(0, len(samples) - per + 1, per)]
            model = nncf.quantize(model, nncf.Dataset(chunks, lambda t: t.numpy()))
        compiled = ov.Core().compile_model(
            model,
            "CPU",
            {
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
                "INFERENCE_PRECISION_HINT": self.settings["precision"],
            },
        )
        self.queue = ov.AsyncInferQueue(compiled, streams)
        self.results: list[Any] = [None] * parts
        self.queue.set_callback(self._keep)

    def _keep(self, request: Any, index: int) -> None:
        self.results[index] = [np.array(t.data) for t in request.output_tensors]

    def call(self) -> Any:
        for i, chunk in enumerate(self.chunks):
            self.queue.start_async(dict(enumerate(chunk)), i, share_inputs=True)
        self.queue.wait_all()
        return [np.concatenate(parts) for parts in zip(*self.results, strict=True)]


class Suanli(Peer):
    """An engine that `suanli optimize` wrote."""

    def prepare(self) -> None:
        import suanli

        self.engine = suanli.load(self.settings["engine"])

    def call(self) -> Any:
        return _plain(self.engine(*self.inputs.args, **self.inputs.kwargs))


def _cast(inputs: Any) -> Any:
    from torch.utils import _pytree as pytree

    from suanli.workloads.record import Inputs

    def low(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.bfloat16() if floating else leaf

    args, kwargs = pytree.tree_map(low, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args=args, kwargs=kwargs)


def _plain(result: Any) -> list[Any]:
    return [
        leaf.float()
        for leaf in torch.utils._pytree.tree_leaves(result)
        if isinstance(leaf, torch.Tensor)
    ]


def _tensors(inputs: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _onnx(peer: Peer) -> Path:
    import tempfile

    path = Path(tempfile.mkdtemp()) / "model.onnx"
    torch.onnx.export(
        peer.model,
        tuple(peer.inputs.args),
        str(path),
        kwargs=dict(peer.inputs.kwargs) or None,
        dynamo=True,
        verbose=False,
    )
    return path
