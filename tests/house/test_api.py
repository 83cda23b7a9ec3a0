"""The public surface is that of docs/api.md, and published versions have bounds."""

import json
from pathlib import Path

import pytest
from api_surface import PAGE, page
from packaging.specifiers import SpecifierSet

from vipolyqwen import configuration_vipolyqwen
from vipolyqwen.configuration_vipolyqwen import SUPPORTED
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel

ROOT = Path(__file__).parents[2]


def test_the_public_surface_is_that_of_the_page() -> None:
    advice = "If the change is meant, run `make api` and name it in CHANGELOG.md."
    assert page() == PAGE.read_text(encoding="utf-8"), advice


def test_requirements_have_the_bounds_that_are_published() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for name, bounds in SUPPORTED.items():
        [line] = [line for line in lines if line.startswith(name) and not line.startswith(f"{name}-")]
        assert SpecifierSet(line.removeprefix(name)) == SpecifierSet(bounds)
    for file in ("constraints.txt", "constraints-lowest.txt"):
        lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if "==" in line]
        pins = dict(line.split("#")[0].strip().split("==") for line in lines)
        assert all(SpecifierSet(bounds).contains(pins[name]) for name, bounds in SUPPORTED.items())


@pytest.mark.parametrize(
    ("version", "warns"), [("5.16.0", True), ("5.17.0", False), ("5.24.0", True), ("6.0.0", True)]
)
def test_loading_with_an_untested_version_of_transformers_says_so(
    tiny: tuple,
    tmp_path: Path,
    version: str,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(configuration_vipolyqwen, "__version__", version)
    configuration_vipolyqwen.warn_of_untested_version.cache_clear()
    with pytest.raises(OSError):
        ViPolyQwenModel.from_pretrained(tmp_path / "none")
    configuration_vipolyqwen.warn_of_untested_version.cache_clear()
    assert (f"transformers {version}" in caplog.text and "pip install" in caplog.text) is warns


def test_sentence_transformers_refuses_untested_versions(tiny: tuple, tmp_path: Path) -> None:
    from sentence_transformers.util import check_version_requirements

    from vipolyqwen.publishing.repository import save_repository

    save_repository(*tiny, tmp_path)
    written = json.loads((tmp_path / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    assert written["requirements"] == SUPPORTED
    with pytest.raises((ImportError, ValueError), match="transformers"):
        check_version_requirements({**written["requirements"], "transformers": ">=5.99,<5.100"}, source="x")
