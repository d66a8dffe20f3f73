"""What is masked in all that is told and recorded."""

import time

import pytest

from stages.errors import UserError, masked

MD5 = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("url = https://me:pa/ss@host/x.zip?token=abc&file=a.zip", "url = https://***@host/x.zip?token=***&file=a.zip"),
        ("url = https://me:p@ss@host/x", "url = https://***@host/x"),
        ("https://ghp@host/a", "https://***@host/a"),
        ("me:hunter2@host/x", "***@host/x"),
        ("x?X-Amz-Signature=ab&X-Amz-Credential=c/d&b=1", "x?X-Amz-Signature=***&X-Amz-Credential=***&b=1"),
        ("url = https://host/x?token=abc: no answer", "url = https://host/x?token=***: no answer"),
        ("x?sv=1&sig=a%2Fb", "x?sv=1&sig=***"),
        ("+    password: hunter2", "+    password: ***"),
        ('+  "api_key": "abc def",', '+  "api_key": ***,'),
        ("+API_TOKEN=abc", "+API_TOKEN=***"),
        ("+AWS_SECRET_ACCESS_KEY = 'abc'", "+AWS_SECRET_ACCESS_KEY = ***"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("aws AKIAABCDEFGHIJKLMNOP", "aws ***"),
        (
            "+ -----BEGIN RSA PRIVATE KEY-----\n+abc\n+-----END RSA PRIVATE KEY-----\n+x",
            "+ -----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\n+x",
        ),
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert str(UserError(text)) == shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "@@ -1,3 +1,3 @@ def f():",
        "see https://host/a@b and a@b.c",
        "git@github.com:me/x.git",
        "http://127.0.0.1:5000/#/x@y",
        "+def f(token: str, key: int) -> None:",
        "+    token = scanner.next(x)",
        "+    key = tree.key(cell)",
        f"sha256 = {MD5}",
        "token: null",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize("piece", ["a", "://a:", "?token", "token='", "-----BEGIN PRIVATE KEY-----", "eyJ", "a:"])
def test_masking_takes_no_longer_than_the_text(piece: str) -> None:
    started = time.process_time()
    masked(piece * (200_000 // len(piece)))
    assert time.process_time() - started < 3
