"""The plugin, with modules made up from what it looks at in vLLM."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from adamix.engines import vllm


def function(parameters, attributes=()):
    names: dict[str, object] = {}
    body = "; ".join(f"{parameters[0]}.{name} = 0" for name in attributes) or "pass"
    exec(f"def made({', '.join(parameters)}, further=None): {body}", names)
    return names["made"]


def known_vllm(without="", renamed=""):
    """Modules by name in which everything is that the plugin looks at, but `without`; the
    parameters of `renamed` are called otherwise."""
    modules = {"vllm": SimpleNamespace(__version__="9.9")}

    def put(module, name, value):
        owner = modules.setdefault(module, SimpleNamespace())
        *classes, last = name.split(".")
        for part in classes:
            if not hasattr(owner, part):
                setattr(owner, part, type(part, (), {}))
            owner = getattr(owner, part)
        if without not in (f"{module}.{name}", last):
            setattr(owner, last, value)

    for module, functions in vllm.PARAMETERS.items():
        for name, parameters in functions.items():
            put(module, name, function(["self_", *parameters] if name == renamed else parameters))
    for module, found in vllm.NAMES.items():
        for name in found:
            if not hasattr(modules.get(module), name):
                put(module, name, object())
    for (module, name), attributes in vllm.ATTRIBUTES.items():
        put(module, f"{name}.__init__",
            function(("self",), [one for one in attributes if one != without]))

    def load(name):
        if name == without or name not in modules:
            raise ImportError(name)
        return modules[name]

    return load


def test_a_vllm_with_all_that_is_used_is_taken():
    vllm.probe(known_vllm())


def test_a_vllm_that_cannot_keep_q_k_and_v_apart_is_refused():
    load = known_vllm()
    mapper = load("vllm.model_executor.models.utils").WeightsMapper
    mapper.__dataclass_fields__ = {vllm.STACKED: None}
    with pytest.raises(vllm.EngineError, match="has no get_rename_mapper or get_unstacked_mapper"):
        vllm.probe(load)
    mapper.get_unstacked_mapper = None
    vllm.probe(load)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"without": "vllm.exceptions"}, "there is no vllm.exceptions"),
    ({"without": "_all_lora_classes"}, "vllm.lora.utils has no _all_lora_classes"),
    ({"without": "slice_lora_b"}, "has no RowParallelLinearWithLoRA.slice_lora_b"),
    ({"without": "packed_modules"}, "LoRAModelManager has no packed_modules"),
    ({"renamed": "RowParallelLinearWithLoRA._apply_lora_to_output"},
     r"_apply_lora_to_output takes \(self_, self, x, output"),
    ({"renamed": "LoRAKernelMeta"}, r"LoRAKernelMeta takes \(self_, token_lora_mapping")])
def test_another_vllm_is_refused_by_what_it_lacks(change, sentence):
    with pytest.raises(vllm.EngineError, match=sentence) as error:
        vllm.probe(known_vllm(**change))
    assert str(error.value).startswith("vLLM 9.9 is not one that adamix knows: ")


def test_the_plugin_is_registered_once_and_leaves_other_engines_alone(monkeypatch):
    mixin = ModuleType(vllm.MIXIN)
    setattr(mixin, vllm.MANAGER, lambda *arguments: ("stock", *arguments))
    monkeypatch.setitem(sys.modules, vllm.MIXIN, mixin)
    vllm.register()
    chosen = getattr(mixin, vllm.MANAGER)
    vllm.register()
    assert getattr(mixin, vllm.MANAGER) is chosen
    plain = SimpleNamespace(additional_config={})
    assert chosen(plain, "cpu", {}) == ("stock", plain, "cpu", {})

    def refuse():
        raise vllm.EngineError("not known")

    monkeypatch.setattr(vllm, "probe", refuse)
    with pytest.raises(vllm.EngineError, match="not known"):
        chosen(SimpleNamespace(additional_config={"adamix": {}}), "cpu", {})


def test_without_its_place_in_vllm_the_plugin_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, vllm.MIXIN, ModuleType(vllm.MIXIN))
    vllm.register()
    assert "this vLLM is left alone" in caplog.text
