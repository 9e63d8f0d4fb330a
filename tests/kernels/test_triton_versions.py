"""Kernels keep to what every Triton that the package admits can compile."""

import ast
import importlib
import inspect
import textwrap

import pytest

from kinetiq.kernels import _compile

OPERATORS = {
    "query_attention",
    "frame_attention",
    "temporal_block",
    "motion_feature",
    "guided_step",
}


def kernel_sources():
    """The text of every function that Triton compiles, by module and name."""
    found = {}
    for operator in {case.operator for case in _compile.find_cases()}:
        module = importlib.import_module(f"kinetiq.kernels.{operator}")
        tree = ast.parse(inspect.getsource(module))
        for node in tree.body:
            marks = getattr(node, "decorator_list", [])
            if any(ast.unparse(mark) == "triton.jit" for mark in marks):
                found[f"{operator}.{node.name}"] = node
    return found


def optional_pointers_returned(function):
    """Names of pointers, which may be None, in what a function returns as part of a tuple."""
    return [
        leaf.id
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
        for leaf in ast.walk(node.value)
        if isinstance(leaf, ast.Name) and leaf.id.endswith("_ptr")
    ]


def test_no_kernel_returns_a_pointer_that_may_be_none_in_a_tuple():
    """Triton 3.6 makes tensors of what a tuple holds when it is returned, and cannot of None."""
    sources = kernel_sources()
    assert {name.partition(".")[0] for name in sources} == OPERATORS
    assert {
        name: names for name, node in sources.items() if (names := optional_pointers_returned(node))
    } == {}


@pytest.mark.parametrize(
    "text",
    [
        "def f(a_ptr): return (a_ptr, 1), a_ptr",
        "def f(a, bank_ptr): return a, ((bank_ptr, 0), a)",
    ],
)
def test_such_a_return_is_seen(text):
    assert optional_pointers_returned(ast.parse(textwrap.dedent(text)).body[0])
