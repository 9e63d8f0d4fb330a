"""PTX that TensorRT can embed, for each target by each route."""

import re
import subprocess
from pathlib import Path

import pytest

from kinetiq.errors import RequestError, WorkError
from kinetiq.export.plugin_compiler import PluginCompiler
from kinetiq.export.plugin_launch import TACTICS, Launch, split_arguments
from kinetiq.export.plugin_layers import Layer, Operand
from kinetiq.export.plugin_ptx import LANGUAGE, ROUTES, Route, embed, find_route, parameters
from kinetiq.kernels._compile import SHARED_LIMITS

ANY = (False, False, False, True)  # of activations, only the width is known
EVERY = [(target, route) for target, routes in ROUTES.items() for route in routes]
PTX = """
.version 8.7
.target sm_90a
.address_size 64
	// .globl	_kernel
.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 _kernel_param_0,
	.param .u32 _kernel_param_1,
	.param .u64 .ptr .global .align 1 _kernel_param_2,
	.param .u64 .ptr .global .align 1 _kernel_param_3
)
.reqntid 128
{
	ld.param.b64 	%rd1, [_kernel_param_0];
	ld.param.b32 	%r1, [_kernel_param_1];
	// _kernel_part
	ret;
}
"""


def activation(element="fp16", d=40, most=(4, 16, 1024)):
    return Operand(element, (*most, 8 * d), ANY)


def attention(operator="query_attention", element="fp16", d=40, most=(4, 16, 1024), **others):
    tensors = dict.fromkeys(("query", "key", "value"), activation(element, d, most))
    return Layer(operator, tensors | others, heads=8)


def controls(rows=4, frames=16, tokens=1024):
    row = Operand("i64", (rows,), (False,))
    blend = Operand("fp32", (rows, frames, tokens), (False,) * 3)
    return {
        "query_row": row,
        "query_blend": blend,
        "deviation_row": row,
        "deviation_blend": blend,
        "deviation_parts": Operand("fp32", (rows, 3), (False, True)),
    }


@pytest.fixture(scope="module")
def compiler():
    with PluginCompiler(find_route("sm_80")) as compiler:
        yield compiler


def assemble(ptx, architecture, folder):
    from triton import knobs

    new = int(architecture.removeprefix("sm_").removesuffix("a")) >= 100
    tool = (knobs.nvidia.ptxas_blackwell if new else knobs.nvidia.ptxas).path
    source = Path(folder) / "kernel.ptx"
    source.write_text(ptx)
    command = [tool, f"-arch={architecture}", "-o", str(source.with_suffix(".cubin")), str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_is_embedded_is_plain():
    name, ptx = embed(PTX, 2, Route("sm_90"))
    assert re.fullmatch(r"_kernel_[0-9a-f]{16}", name)
    assert parameters(ptx) == (name, ["u64", "u32"])
    assert ".target sm_90\n" in ptx
    assert f"[{name}_param_0]" in ptx
    assert "// _kernel_part" in ptx  # another word is left alone
    assert name == embed(PTX, 2, Route("sm_90"))[0]
    own_name, own = embed(PTX, 2, Route("sm_90", own=True))
    assert ".target sm_90a\n" in own
    assert own_name != name


def test_what_cannot_be_embedded():
    with pytest.raises(WorkError, match=r"must use no scratch memory.*_kernel_param_1"):
        embed(PTX, 1, Route("sm_90"))
    with pytest.raises(WorkError, match="must have 5 parameters, got 4"):
        embed(PTX, 5, Route("sm_90"))
    with pytest.raises(WorkError, match=r"version 9.0 at most, got '.version 9.1'"):
        embed(PTX.replace("8.7", "9.1"), 2, Route("sm_90"))
    with pytest.raises(WorkError, match="one entry, got 0"):
        embed("", 2, Route("sm_90"))


def test_routes_to_a_target():
    assert find_route("sm_89").name == "sm_89"
    assert find_route("sm_90").name == "sm_80"
    for target, older in (("sm_87", 80), ("sm_103", 80), ("sm_110", 80), ("sm_121", 120)):
        assert find_route(target) == Route(f"sm_{older}")  # which every later GPU takes
    assert find_route("sm_90", "sm_90a") == Route("sm_90", own=True)
    with pytest.raises(RequestError, match=r"target must be one of sm_80, .*got 'sm_70'"):
        find_route("sm_70")
    with pytest.raises(
        RequestError, match="route to sm_90 must be one of sm_80, sm_90a, got 'sm_90'"
    ):
        find_route("sm_90", "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "route"), EVERY, ids=[f"{t}-{r.name}" for t, r in EVERY])
def test_each_target_by_each_route(target, route, tmp_path):
    names, min_limit = set(), SHARED_LIMITS["sm_86"]
    channels = {"x": activation(), "channels": Operand("i64", (51,), (False,))}
    layers = [
        attention(),
        attention(d=80, **{k: v for k, v in controls().items() if k.startswith("query")}),
        attention("frame_attention", **controls()),
        Layer("motion_feature", channels),
    ]
    with PluginCompiler(route) as compiler:
        for layer in layers:
            for tactic in TACTICS:
                kernel = compiler.compile(layer, tactic)
                done = assemble(kernel.ptx, route.name, tmp_path)
                assert not done.returncode, done.stderr
                assert kernel.shared_bytes <= SHARED_LIMITS.get(target, min_limit)
                entry, types = parameters(kernel.ptx)
                pointers = len(layer.operands)
                integers = len(kernel.arguments) - pointers - 1
                assert (entry, types) == (
                    kernel.name,
                    ["u64"] * pointers + ["u32"] * integers + ["u64"],
                )
                version = re.search(r"^\.version (\d+)\.(\d+)", kernel.ptx, re.MULTILINE)
                assert int(version[1] + version[2]) <= LANGUAGE
                assert f".target {route.name}\n" in kernel.ptx
                names.add(kernel.name)
    assert len(names) >= len(layers)


def test_one_target_is_assembled(compiler, tmp_path):
    kernel = compiler.compile(attention())
    assert not assemble(kernel.ptx, "sm_80", tmp_path).returncode
    assert "cp.async" in kernel.ptx  # loads ahead, 16 bytes each, need aligned addresses and lines
    assert kernel.constants["EVEN_KEYS"] is False  # keys fill whole blocks, but may be fewer
    assert kernel.arguments == (
        "query_ptr", "key_ptr", "value_ptr", "frames", "tokens", "keys",
        "query_by_row", "query_by_frame", "key_by_row", "key_by_frame",
        "value_by_row", "value_by_frame", "out_ptr",
    )  # fmt: skip


def test_what_is_fixed_is_in_the_kernel(compiler):
    fixed = Operand("fp16", (2, 8, 64, 320), (True,) * 4)
    layer = Layer("query_attention", dict.fromkeys(("query", "key", "value"), fixed), heads=8)
    kernel = compiler.compile(layer)
    assert kernel.arguments == ("query_ptr", "key_ptr", "value_ptr", "out_ptr")
    assert kernel.constants["tokens"] == 64
    assert kernel.constants["EVEN_KEYS"] is True


def test_a_layer_that_is_not_one_kernel(compiler):
    # A mask in float16 has to be made float32 by another kernel.
    seen = Operand("i64", (4, 1), (False, True))
    mask = Operand("fp16", (4, 16, 1024), (False,) * 3)
    layer = attention(key_rows=seen, key_log_mask=mask)
    with pytest.raises(RequestError, match=r"query_attention must be one kernel.*function body"):
        compiler.compile(layer)


def test_deviations_of_wide_heads_are_one_kernel(compiler):
    # The operator's own launch is two there: deviations are moved before, in memory.
    layer = attention("frame_attention", d=128, most=(2, 32, 16), **controls(2, 32, 16))
    kernel = compiler.compile(layer)
    assert kernel.constants["PART"] == kernel.constants["FRAMES"] == 32


def test_lengths_beyond_32_bits(compiler):
    layer = attention(most=(2, 1024, 2**14))
    with pytest.raises(RequestError, match=r"query_by_row .* at most 2147483647, got 5368709120"):
        compiler.compile(layer)


def test_a_process_that_ended_is_told(compiler):
    with PluginCompiler(find_route("sm_80")) as other:
        other._process.kill()
        other._process.wait()
        with pytest.raises(WorkError, match="must answer, and ended"):
            other.compile(attention())


LAUNCH = {
    "frames": 8, "elements": 64 * 5, "chosen": 5, "width": 32, "x_row": 8 * 64 * 32,
    "x_frame": 64 * 32, "x_token": 32, "x_channel": 1, "blocks": 20, "BLOCK": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", [*sorted(set(LAUNCH) - {"BLOCK"}), "programs"])
def test_integers_are_those_of_the_launch(name):
    layer = Layer(
        "motion_feature",
        {
            "x": Operand("fp16", (2, 8, 64, 32), ANY),
            "channels": Operand("i64", (5,), (False,)),
        },
    )
    constants, passed = split_arguments(layer, Launch(None, dict(LAUNCH), {}, 40))
    assert list(passed) == ["frames", "elements", "chosen", "x_row", "x_frame", "blocks"]
    assert constants == {"width": 32, "x_token": 32, "x_channel": 1, "BLOCK": 16}
    wrong = LAUNCH | ({} if name == "programs" else {name: LAUNCH[name] + 1})
    launch = Launch(None, wrong, {}, 41 if name == "programs" else 40)
    with pytest.raises(WorkError, match=rf"{name} of motion_feature must be \d+ as in its launch"):
        split_arguments(layer, launch)
