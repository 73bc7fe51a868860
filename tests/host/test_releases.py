"""A transformers that was not tested is refused in one line, by its release, with the cure."""

import pytest

import trol
from hosts import HOSTS
from trol import host
from trol.cli import main
from trol.errors import HostError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    real = host.version

    def set_version(text: str) -> None:
        host.check_release.cache_clear()
        monkeypatch.setattr(
            host, "version", lambda name: text if name == "transformers" else real(name)
        )

    yield set_version
    monkeypatch.undo()
    host.check_release.cache_clear()


@pytest.mark.parametrize(
    ("text", "how"),
    [("5.16.0", "older"), ("4.57.6", "older"), ("5.99.0", "newer"), ("6.0.0", "newer")],
)
def test_another_release_is_refused(installed, text: str, how: str) -> None:
    installed(text)
    with pytest.raises(HostError) as raised:
        trol.attach(HOSTS["llama"].build(), "all")
    message = str(raised.value)
    assert f"transformers {text} is {how}" in message
    assert "pip install 'transformers" in message
    assert "\n" not in message


def test_commands_print_the_refusal_and_end_with_1(
    installed, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("5.99.0")
    with pytest.raises(SystemExit) as ended:
        main(["plan", "trol-tiny", "--method", "uniform", "--keep", "0.5"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("trol: transformers 5.99.0 is newer")


def test_the_allowed_ones_are_those_of_the_metadata(installed) -> None:
    tested = host.required("transformers")
    assert tested is not None
    for text in ("5.16.1", "5.23.0", "5.24.0"):
        installed(text)
        host.check_release()
        assert text in tested.specifier
