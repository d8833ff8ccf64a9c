"""Secrets in files that are about to be published, found by what they look like, or by what they are called."""

import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_token


# A word may stand right before any of these. Each pattern begins with plain text, which `re` finds fast.
_BY_LOOK = {
    "a Hugging Face token": (
        rb"hf_(?:[A-Za-z0-9]{20,}|(?:oauth|jwt)_[A-Za-z0-9._-]{20,})",
        rb"api_org_[A-Za-z0-9]{20,}",
    ),
    "a GitHub token": (rb"gh[pousr]_[A-Za-z0-9]{36}", rb"github_pat_[A-Za-z0-9_]{40,}"),
    "a GitLab token": (rb"gl(?:pat|rt|dt|ptt|cbt)-[A-Za-z0-9_-]{20,}",),
    "an AWS key": (rb"A(?:KIA|SIA|BIA|CCA)[0-9A-Z]{16}(?![0-9A-Za-z])",),
    "a Weights & Biases key": (rb"wandb_v1_[A-Za-z0-9_]{20,}",),
    "a Google key": (rb"AIza[A-Za-z0-9_-]{35}", rb"GOCSPX-[A-Za-z0-9_-]{24,}", rb"ya29\.[A-Za-z0-9_-]{30,}"),
    "an Azure key": (rb"AccountKey=[A-Za-z0-9+/]{80,}",),
    "a key of a package registry": (
        rb"npm_[A-Za-z0-9]{36}",
        rb"pypi-AgE[A-Za-z0-9_-]{40,}",
        rb"dckr_pat_[A-Za-z0-9_-]{20,}",
    ),
    "an API key": (
        rb"sk-(?:proj|ant|svcacct|admin)-[A-Za-z0-9_-]{20,}",
        # Groq, xAI, NVIDIA, Perplexity, Replicate, Databricks, DigitalOcean, HashiCorp, SendGrid, Stripe.
        rb"gsk_[A-Za-z0-9]{40,}",
        rb"xai-[A-Za-z0-9]{60,}",
        rb"nvapi-[A-Za-z0-9_-]{40,}",
        rb"pplx-[A-Za-z0-9]{40,}",
        rb"r8_[A-Za-z0-9]{37}",
        rb"dapi[0-9a-f]{32}(?![0-9a-f])",
        rb"do[opr]_v1_[0-9a-f]{60,}",
        rb"hvs\.[A-Za-z0-9_-]{24,}",
        rb"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
        rb"[sr]k_(?:live|test)_[A-Za-z0-9]{20,}",
        # Shopify, Doppler, Linear, Figma, Notion (two), Airtable, Postman, New Relic, Sentry, Grafana, Mailgun, Mailchimp,
        # Telegram, Twilio.
        rb"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
        rb"dp\.(?:pt|st|ct|sa|scim|audit)\.(?:[a-z0-9_-]{2,35}\.)?[A-Za-z0-9]{40,}",
        rb"lin_(?:api|oauth)_[A-Za-z0-9]{32,}",
        rb"fig[dour]_[A-Za-z0-9_-]{36,}",
        rb"ntn_[A-Za-z0-9]{40,}",
        rb"secret_[A-Za-z0-9]{43}(?![A-Za-z0-9])",
        rb"pat[A-Za-z0-9]{14}\.[0-9a-f]{64}",
        rb"PMAK-[0-9a-f]{24}-[0-9a-f]{34}",
        rb"NRAK-[A-Z0-9]{27}",
        rb"sntrys_[A-Za-z0-9+/=_-]{40,}",
        rb"gl(?:sa|c)_[A-Za-z0-9_=]{32,}",
        rb"key-[0-9a-f]{32}(?![0-9a-f])",
        rb"-us(?<=[0-9a-f]{32}-us)[0-9]{1,2}(?![0-9A-Za-z])",
        rb":AA(?<=[0-9]{8}:AA)[A-Za-z0-9_-]{33}",
        rb"(?:AC|SK)[0-9a-f]{32}(?![0-9A-Za-z])",
        # Behind a letter only one without hyphens: task- and risk- end alike.
        rb"sk-(?:(?<![A-Za-z0-9]sk-)[A-Za-z0-9_-]{24,}|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{32,})",
    ),
    "a Slack token": (rb"xox[abeprs]-[A-Za-z0-9-]{10,}", rb"xapp-[0-9]-[A-Za-z0-9-]{20,}"),
    "a webhook's address": (
        rb"hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/]{20,}",
        rb"discord(?:app)?\.com/api/webhooks/[0-9]+/[A-Za-z0-9_-]{20,}",
    ),
    "a JSON web token": (rb"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",),
    "a private key": (
        rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
        rb"PuTTY-User-Key-File-[0-9]",
        rb"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----",
        rb"AGE-SECRET-KEY-1[0-9A-Z]{50,}",
    ),
}
# Between the name of a setting and its value.
_IS = rb"[\"']?[ \t]*(?:=>|:=|[:=])[ \t]*[\"']?"
# What stands for a password without being one: a type, a placeholder, a variable, a path or a call.
_NONE = rb"(?!(?:none|null|true|false|str|optional|required|changeme|example|xxx+|[\w.]*password)\b|self\.|[<$%{(\[\\*/~.]|[\w.]+[(\[])"
# Assigned, in quotes, or after a colon with a digit in it: prose has colons too.
_PASSWORD = (
    rb"(?:[ \t]*=[ \t]*[\"']?" + _NONE + rb"[!#-&*-:<-~]{6,}"
    rb"|[\"']?[ \t]*:[ \t]*[\"']" + _NONE + rb"[!#-&(-~]{6,}[\"']"
    rb"|[ \t]*:[ \t]*" + _NONE + rb"(?=[!-~]*[0-9])[!#-&*-:<-~]{6,})"
)
_KEY = _IS + rb"(?=[a-z_-]*[0-9])(?=[0-9_-]*[a-z])[a-z0-9_-]{20,}"
# Secrets that look like other digests, and are found by the name before them. The text is put in lower case first.
_BY_NAME = {
    "an AWS secret": tuple(
        name + _IS + rb"[a-z0-9/+]{40}(?![a-z0-9/+])" for name in (rb"secret_?access_?key", rb"aws_?secret(?:_?key)?")
    ),
    "a Weights & Biases key": (
        rb"wandb(?:[\w.(]*(?:key|token)" + _IS + rb"|\.?[ _]?login[ (\"']+)[0-9a-f]{40}(?![0-9a-z])",
    ),
    "an API key": (
        *(
            name + _KEY
            for name in (rb"api_?key", rb"secret_?key", rb"client_?secret", rb"access_?token", rb"auth_?token")
        ),
        rb"authorization" + _IS + rb"(?:bearer|basic|token)[ \t]+(?=[a-z+/._-]*[0-9])[a-z0-9+/._=-]{20,}",
        rb"\"username\"\s*:\s*\"[^\"]+\"\s*,\s*\"key\"\s*:\s*\"[0-9a-f]{32}\"",  # Kaggle's file
        # As long as a secret of AWS or an old key of Weights & Biases.
        *(name + _IS + rb"(?=[a-z/+]*[0-9])[a-z0-9/+]{40}(?![a-z0-9/+])" for name in (rb"token", rb"secret", rb"key")),
    ),
    "a password": (
        *(name + _PASSWORD for name in (rb"password", rb"passwd", rb"passphrase", rb"pwd")),
        rb"machine[ \t]+[\w.-]+\s+login\s+[!-~]+\s+password\s+[!-~]{6,}",
        rb"://[\w.-]+:" + _NONE + rb"[!#-&*-.0-9;-?A-~]{6,}@[a-z0-9]",
    ),
}
# Characters in UTF-16 or UTF-32, in either order of bytes.
_WIDE = rb"(?:[\t\n\r -~]\0(?:\0\0)?){8,}[\t\n\r -~]?"
# Files are read in parts, which overlap by more than a secret's length.
_PART, _OVERLAP = 1 << 24, 1 << 12


def check_secrets(name: str, content: Path | bytes) -> None:
    """
    Raises:
        ValueError: for anything that looks like a secret, and for the token in use. The message does not repeat it.
    """
    token = get_token()
    own = {"your own Hugging Face token": (re.escape(token.encode()),)} if token else {}
    for start, part in _parts(content):
        wide = b"\n".join(text.replace(b"\0", b"") for text in re.findall(_WIDE, part))
        for is_wide, data in enumerate((part, wide)):
            for patterns, text in ((_BY_LOOK | own, data), (_BY_NAME, data.lower())):
                if found := _first_secret(patterns, text):
                    what, place = found
                    where = f"in UTF-16 or UTF-32 text after byte {start}" if is_wide else f"at byte {start + place}"
                    raise ValueError(
                        f"{name} holds what looks like {what} ({where}): remove it, and revoke it if it is one."
                    )


def _first_secret(patterns: dict[str, tuple[bytes, ...]], text: bytes) -> tuple[str, int] | None:
    """The kind of the first secret and its place in the text, or `None`."""
    for what, several in patterns.items():
        for pattern in several:
            if match := re.search(pattern, text):
                return what, match.start()
    return None


def _parts(content: Path | bytes) -> Iterator[tuple[int, bytes]]:
    """The parts of the content, each with the place at which it begins."""
    if isinstance(content, bytes):
        yield 0, content
        return
    with content.open("rb") as file:
        start, part = 0, file.read(_PART)
        while part:
            yield start, part
            start, kept = start + max(len(part) - _OVERLAP, 0), part[-_OVERLAP:]
            following = file.read(_PART)
            part = kept + following if following else b""
