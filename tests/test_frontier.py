"""The table of kept runs: quality against measured bits."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import decode_attention, decode_model, encode, frontier, memory, prefill


def prose(name: str, seed: int, bits: float, kl: float) -> dict[str, Any]:
    figures = {"context": 4096, "bits_per_value": bits, "dnll": kl, "kl": kl}
    return {"name": name, "overrides": [f"tiers={name}"], "task": "perplexity", "seed": seed, **figures}


def test_the_table_is_drawn_whole_however_narrow_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    keys = {"name": "int4", "overrides": ["tiers=int4"], "task": "passkey", "context": 512, "samples": 20, "accuracy": 0.95}
    rows = [prose("int4", 0, 5.0, 0.01), prose("int4", 20, 5.0, 0.03), prose("int2", 0, 5.5, 0.2), keys]
    frontier.show(frontier.gather(rows, 4096))
    told = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if "  int" in line}
    assert told["int4"] == ["5.00", "3.20", "+0.0200", "0.0141", "0.0200", "2", "95%", "*"]
    assert told["int2"] == ["5.50", "2.91", "+0.2000", "0.2000", "1"]


@pytest.mark.parametrize("benchmark", [decode_attention, decode_model, encode, memory, prefill])
def test_a_benchmark_without_a_gpu_ends_in_one_line(benchmark, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: it measures a CUDA GPU, and none is here\n")
