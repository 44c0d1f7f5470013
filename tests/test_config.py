import pytest
from pydantic import PositiveInt

from unweave.config import Config, apply_overrides, read_yaml
from unweave.errors import UnweaveError


class Inner(Config):
    lr: float = 1e-3


class Outer(Config):
    width: PositiveInt = 4
    inner: Inner = Inner()


def test_round_trips(tmp_path):
    config = Outer(width=8, inner=Inner(lr=0.5))
    assert Outer.from_json(config.to_json()) == config
    config.to_yaml(tmp_path / "c.yaml")
    assert Outer.from_yaml(tmp_path / "c.yaml") == config


def test_overrides_reach_nested_fields_and_numbers_in_every_spelling(tmp_path):
    Outer().to_yaml(tmp_path / "c.yaml")
    assert Outer.from_yaml(tmp_path / "c.yaml", ["inner.lr=2e-4", "width=9"]) == Outer(width=9, inner=Inner(lr=2e-4))
    with pytest.raises(UnweaveError, match="key=value"):
        apply_overrides({}, ["nonsense"])
    with pytest.raises(UnweaveError, match="is a value"):
        apply_overrides({"width": 3}, ["width.x=1"])


def test_frozen():
    with pytest.raises(Exception, match="frozen"):
        Outer().width = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, r"unknown key 'widht' \(did you mean 'width'\?\)"),
        ({"inner": {"lrr": 1}}, r"Inner: unknown key 'lrr' \(did you mean 'lr'\?\)"),
        ({"width": -1}, "width: Input should be greater than 0, found -1"),
        ({"width": "wide"}, "width: .*found 'wide'"),
    ],
)
def test_one_clear_error(values, message):
    with pytest.raises(UnweaveError, match=message):
        Outer.from_dict(values)


def test_yaml_errors_name_the_file(tmp_path):
    with pytest.raises(UnweaveError, match="no recipe at"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UnweaveError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UnweaveError, match="expected keys"):
        read_yaml(tmp_path / "list.yaml")
