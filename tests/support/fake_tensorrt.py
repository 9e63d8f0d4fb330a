"""A core of TensorRT that is just enough to host NVIDIA's own plugin package, without a GPU.

The package (`tensorrt_bindings.plugin`) is pure Python over a core of classes, which are stood in
for here. `build_layer` plays what the builder does with one plugin: ask for types, shapes, formats
and tactics, then for the launch and the kernel, and evaluate the expressions of sizes at shapes.
This proves the Python half of a plugin; it proves nothing about TensorRT itself.
"""

import enum
import importlib.machinery
import importlib.util
import operator
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

_OPERATIONS = {
    "SUM": operator.add,
    "PROD": operator.mul,
    "MAX": max,
    "MIN": min,
    "SUB": operator.sub,
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
    "FLOOR_DIV": operator.floordiv,
    "CEIL_DIV": lambda a, b: -(-a // b),
}
_ENUMS = {
    "DataType": "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8 FP8 INT4",
    "TensorFormat": "LINEAR HWC",
    "PluginFieldType": "FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 INT64 CHAR UNKNOWN BF16",
    "QuickPluginCreationRequest": "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT",
    "TensorRTPhase": "BUILD RUNTIME",
    "DimensionOperation": " ".join(_OPERATIONS),
    "PluginArgType": "INT",
    "PluginArgDataType": "INT8 INT16 INT32",
}
_FLAGS = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")
_ELEMENTS = {1: "FLOAT", 7: "INT64", 10: "HALF", 16: "BF16"}  # onnx.TensorProto.DataType
_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
_BASES = (
    "IPluginV3 IPluginV3QuickCore IPluginV3QuickBuild IPluginV3QuickRuntime IPluginV3QuickAOTBuild "
    "IPluginCreatorV3Quick ITensor ISymExpr"
)


class Expression:
    """An IDimensionExpr: a function of the inputs' shapes, perhaps constant."""

    def __init__(self, function, constant=None):
        self.function, self.constant = function, constant

    def is_constant(self):
        return self.constant is not None

    def get_constant_value(self):
        return self.constant


class ExpressionBuilder:
    def constant(self, value):
        return Expression(lambda _: value, value)

    def operation(self, kind, left, right):
        run = _OPERATIONS[kind.name]
        known = left.is_constant() and right.is_constant()
        return Expression(
            lambda shapes: run(left.function(shapes), right.function(shapes)),
            run(left.constant, right.constant) if known else None,
        )


class _Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, *_):
        pass

    def log(self, *_):
        pass


class _Field:
    def __init__(self, name, data, type):  # noqa: A002  TensorRT's word
        self.name, self.data, self.type = name, data, type


class _Exprs(list):
    def __init__(self, given):
        super().__init__([None] * given if isinstance(given, int) else given)


class _Registry:
    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, _):
        self.creators[creator.name, creator.plugin_version, creator.plugin_namespace] = creator
        return True

    def get_creator(self, name, version, namespace):
        return self.creators[name, version, namespace]


class _Description:
    def __init__(self):
        self.dims = self.type = self.format = None
        self.scale = 1.0


class _DynamicDescription:
    def __init__(self, dims, least, most, kind, layout):
        self.desc = _Description()
        self.desc.dims, self.desc.type, self.desc.format = dims, kind, layout
        self.min, self.opt, self.max = least, most, most


@contextmanager
def hosted():
    """Inside, `tensorrt` is the core and `tensorrt.plugin` NVIDIA's package; yields both."""
    core = types.ModuleType("tensorrt")
    for name, members in _ENUMS.items():
        setattr(core, name, enum.Enum(name, members.split()))
    for name, member in _NAMES.items():
        setattr(core, name, core.DataType[member])
    for name in _BASES.split():
        setattr(core, name, type(name, (), {"__init__": lambda *_: None}))
    core.Logger = core.ILogger = _Logger
    core.Dims = type("Dims", (tuple,), {"MAX_DIMS": 8})
    core.PluginField, core.PluginFieldCollection = _Field, list
    core.IDimensionExpr, core.DimsExprs = Expression, _Exprs
    core.PluginTensorDesc, core.DynamicPluginTensorDesc = _Description, _DynamicDescription
    registry = _Registry()
    core.get_plugin_registry = lambda: registry
    core.__version__, core.built, core.configs = "11.4", [], []
    core.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", list(_FLAGS))
    core.BuilderFlag = enum.Enum("BuilderFlag", ["TF32", "FP16"])
    core.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["DETAILED"])
    core.OnnxParser = _Parser
    core.Builder = lambda log: _Builder(core, log)
    found = importlib.util.find_spec("tensorrt_bindings")
    folder = Path(found.submodule_search_locations[0]) / "plugin"
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    before = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    for name in before:
        del sys.modules[name]
    sys.modules |= {"tensorrt": core, "tensorrt.plugin": package}
    core.plugin = package
    try:
        spec.loader.exec_module(package)
        yield core, package
    finally:
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules |= before


def _is_ours(name):
    return name == "tensorrt" or name.startswith("tensorrt.")


@dataclass(frozen=True)
class Given:
    """An input of a layer: type, shape, and the longest of each axis where that may change."""

    type: str
    shape: tuple[int, ...]
    most: tuple[int | None, ...]


@dataclass(frozen=True)
class Built:
    """What the builder would embed, and what it would pass at the given shapes."""

    shapes: list[tuple[int, ...]]
    types: list[Any]
    combinations: int
    tactics: list[int]
    name: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    integers: list[int]


def create_plugin(core, name, attributes, request):
    """What the parser does with a node of the namespace `kinetiq`."""
    creator = core.get_plugin_registry().get_creator(name, "1", "kinetiq")
    fields = [_Field(key, np.array([value], np.int32), None) for key, value in attributes.items()]
    return creator.create_plugin(name, "kinetiq", fields, core.TensorRTPhase.BUILD, request)


def run_layer(core, name, attributes, inputs, out):
    """What a runtime with Python does with a plugin: inputs and output are tensors of PyTorch."""
    request = core.QuickPluginCreationRequest.STRICT_JIT
    plugin = create_plugin(core, name, attributes, request)
    tensors = [*inputs, out]
    described = []
    for tensor in tensors:
        one = _Description()
        one.dims, one.format = tuple(tensor.shape), core.TensorFormat.LINEAR
        one.type = core.DataType[_NAMES[str(tensor.dtype).removeprefix("torch.")]]
        described.append(one)
    addresses = [tensor.data_ptr() for tensor in tensors]
    strides = [tensor.stride() for tensor in tensors]
    count = len(inputs)
    plugin.enqueue(
        described[:count],
        described[count:],
        addresses[:count],
        addresses[count:],
        strides[:count],
        strides[count:],
        7,
    )


def build_layer(core, name, attributes, inputs, tactic=None):
    """What the parser and the builder do with one plugin of the namespace `kinetiq`."""
    plugin = create_plugin(core, name, attributes, core.QuickPluginCreationRequest.PREFER_AOT)
    shapes, builder = [one.shape for one in inputs], ExpressionBuilder()
    kinds = [core.DataType[one.type] for one in inputs]
    out_kinds = plugin.get_output_data_types(kinds, [len(shape) for shape in shapes])

    def axis(index, at):
        fixed = inputs[index].most[at] is None
        return Expression(lambda given: given[index][at], shapes[index][at] if fixed else None)

    axes = [_Exprs([axis(i, j) for j in range(len(shape))]) for i, shape in enumerate(shapes)]
    results = plugin.get_output_shapes(axes, [], builder)
    largest = [
        tuple(most or length for most, length in zip(one.most, one.shape, strict=True))
        for one in inputs
    ]

    def describe(shape, most, kind, known):
        dims = tuple(length if fixed else -1 for length, fixed in zip(shape, known, strict=True))
        least = tuple(length if fixed else 1 for length, fixed in zip(shape, known, strict=True))
        return _DynamicDescription(dims, least, most, kind, core.TensorFormat.LINEAR)

    described = [
        describe(one.shape, most, kind, [length is None for length in one.most])
        for one, most, kind in zip(inputs, largest, kinds, strict=True)
    ]
    described += [
        describe(
            [expression.function(shapes) for expression in result],
            tuple(expression.function(largest) for expression in result),
            kind,
            [expression.is_constant() for expression in result],
        )
        for result, kind in zip(results, out_kinds, strict=True)
    ]
    count = len(inputs)
    combinations = plugin.get_supported_format_combinations(described, count)
    plugin.configure_plugin(described[:count], described[count:])
    tactics = sorted(plugin.get_valid_tactics())
    plugin.set_tactic(tactics[0] if tactic is None else tactic)
    params, extra = types.SimpleNamespace(), _Extra()
    plugin.get_launch_params(axes, described, count, params, extra, builder)
    kernel, ptx = plugin.get_kernel(
        [one.desc for one in described[:count]], [one.desc for one in described[count:]]
    )

    def evaluate(argument):
        return argument.expr.function(shapes)

    return Built(
        shapes=[tuple(axis.function(shapes) for axis in result) for result in results],
        types=list(out_kinds),
        combinations=len(combinations) // len(described),
        tactics=tactics,
        name=kernel,
        ptx=ptx.decode(),
        grid=tuple(evaluate(getattr(params, f"grid_{axis}")) for axis in "xyz"),
        block=tuple(evaluate(getattr(params, f"block_{axis}")) for axis in "xyz"),
        shared_bytes=evaluate(params.shared_mem),
        integers=[evaluate(extra[index]) for index in range(extra.nbSymExprs)],
    )


class _Extra(dict):
    nbSymExprs = 0  # noqa: N815  TensorRT's word


class _Parser:
    num_errors = 0

    def __init__(self, network, _):
        self._network = network

    def parse(self, data, _):
        self._network.model = onnx.load_from_string(data)
        return True


class _Profile(dict):
    def set_shape(self, name, least, best, most):
        if not len(least) == len(best) == len(most) or not all(
            0 <= low <= middle <= high for low, middle, high in zip(least, best, most, strict=True)
        ):
            raise ValueError(f"inconsistent shapes of {name}")
        self[name] = (least, best, most)


class _Config:
    def __init__(self, core):
        self.profiles, self.profiling_verbosity = [], None
        self.flags = {core.BuilderFlag.TF32}  # which is set unless it is cleared

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def get_flag(self, flag):
        return flag in self.flags

    def add_optimization_profile(self, profile):
        if not profile:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1


class _Builder:
    """Builds the plugins of a network, which are the nodes that a plugin is registered for."""

    def __init__(self, core, log):
        self._core, self._log = core, log

    def create_network(self, flags):
        assert flags & 1 << self._core.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return types.SimpleNamespace(model=None, num_layers=0, flags=flags)

    def create_builder_config(self):
        return _Config(self._core)

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        self._core.configs.append(config)
        (profile,) = config.profiles
        assert set(profile) == {value.name for value in network.model.graph.input}
        kinds = {
            value.name: _ELEMENTS[value.type.tensor_type.elem_type]
            for value in network.model.graph.input
        }
        registered = self._core.get_plugin_registry().creators
        prefers = self._core.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS
        try:
            for node in network.model.graph.node:
                said = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
                namespace = said.pop("plugin_namespace", b"").decode()
                if (node.op_type, "1", namespace) not in registered:
                    continue
                assert network.flags & 1 << prefers  # both kinds of implementation are there
                given = []
                for name in node.input:
                    least, best, most = profile[name]
                    changing = [
                        high if low != high else None for low, high in zip(least, most, strict=True)
                    ]
                    given.append(Given(kinds[name], tuple(best), tuple(changing)))
                self._core.built.append(build_layer(self._core, node.op_type, said, given))
        except Exception:  # which TensorRT does not pass on
            self._log.log(_Logger.ERROR, "a plugin failed")
            return None
        return b"plan"
