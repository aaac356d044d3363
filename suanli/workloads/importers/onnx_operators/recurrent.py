"""Recurrent layers, one direction or both, in torch's order of gates."""

from collections.abc import Callable
from typing import Any

import torch

from suanli.workloads.importers.onnx_value import Call, Result, Table

# position in ONNX of each gate, in the order that torch wants them
_LSTM_GATES = (0, 2, 3, 1)  # ONNX i o f c, torch i f g o
_GRU_GATES = (1, 0, 2)  # ONNX z r h, torch r z n
_RNN_GATES = (0,)


def _reordered(weight: torch.Tensor, gates: tuple[int, ...]) -> torch.Tensor:
    parts = weight.chunk(len(gates), 0)
    return torch.cat([parts[gate] for gate in gates]) if len(gates) > 1 else weight


def _parameters(call: Call, gates: tuple[int, ...]) -> list[torch.Tensor]:
    """Weights of all directions in the order of torch's flat list."""
    w, r, b = call.tensor(1), call.tensor(2), call.optional(3)
    flat = []
    for direction in range(w.shape[0]):
        flat += [_reordered(w[direction], gates), _reordered(r[direction], gates)]
        if b is not None:
            inner, outer = b[direction].chunk(2, 0)
            flat += [_reordered(inner, gates), _reordered(outer, gates)]
    return flat


def _checked(call: Call, names: tuple[str, ...]) -> tuple[int, int]:
    """Number of directions and hidden size, of a layer that torch has too."""
    if call.has(4) or call.has(7) or call.attribute("clip") or call.attribute("layout", 0):
        raise call.error("uses lengths, peepholes, clipping or batch-first, which is not supported")
    direction = call.attribute("direction", "forward")
    if direction == "reverse":
        raise call.error("runs backwards only, which is not supported")
    both = direction == "bidirectional"
    given = call.attribute("activations")
    if given and tuple(given) != names * (2 if both else 1):
        raise call.error(f"uses activations {', '.join(given)}, which is not supported")
    return 2 if both else 1, int(call.attribute("hidden_size"))


def _start(call: Call, index: int, directions: int, hidden: int) -> torch.Tensor:
    if call.has(index):
        return call.tensor(index)
    x = call.tensor(0)
    return x.new_zeros(directions, x.shape[1], hidden)


def _sequence(output: torch.Tensor, directions: int, hidden: int) -> torch.Tensor:
    # torch [T, B, directions * H], ONNX [T, directions, B, H]
    length, batch = output.shape[:2]
    return output.reshape(length, batch, directions, hidden).transpose(1, 2)


def _run(function: Callable[..., Any], call: Call, state: Any, gates: tuple[int, ...]) -> Any:
    both = call.attribute("direction", "forward") == "bidirectional"
    parameters, has_biases = _parameters(call, gates), call.has(3)
    # one layer, no dropout, not training, time first
    return function(call.tensor(0), state, parameters, has_biases, 1, 0.0, False, both, False)


def _lstm(call: Call) -> Result:
    directions, hidden = _checked(call, ("Sigmoid", "Tanh", "Tanh"))
    state = (_start(call, 5, directions, hidden), _start(call, 6, directions, hidden))
    output, h, c = _run(torch.lstm, call, state, _LSTM_GATES)
    return [_sequence(output, directions, hidden), h, c]


def _gru(call: Call) -> Result:
    directions, hidden = _checked(call, ("Sigmoid", "Tanh"))
    if not call.attribute("linear_before_reset", 0):
        raise call.error("resets before its product, which torch does not have")
    output, h = _run(torch.gru, call, _start(call, 5, directions, hidden), _GRU_GATES)
    return [_sequence(output, directions, hidden), h]


def _rnn(call: Call) -> Result:
    relu = tuple(call.attribute("activations") or ())[:1] == ("Relu",)
    directions, hidden = _checked(call, ("Relu",) if relu else ("Tanh",))
    function: Callable[..., Any] = torch.rnn_relu if relu else torch.rnn_tanh
    output, h = _run(function, call, _start(call, 5, directions, hidden), _RNN_GATES)
    return [_sequence(output, directions, hidden), h]


RECURRENT: Table = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}
