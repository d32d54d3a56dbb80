"""What is measured."""

from benchmarks import plan, rivals


def test_plan_has_no_item_twice_and_rivals_only_where_installed(monkeypatch):
    monkeypatch.setattr(rivals, "available", lambda kernel: False)
    items = plan.items()
    assert len(set(items)) == len(items)
    assert not {item.kernel for item in items} & set(rivals.MODULES)
    assert set(plan.compiled_alone()) <= set(items)
    monkeypatch.setattr(rivals, "available", lambda kernel: True)
    specs = {item.spec for item in plan.items() if item.kernel == "aqlm_1x16"}
    assert "m1v8b16g4096" in specs
