"""The Hub: one directory that bake wrote becomes one commit, read back and compared.

`access` asks before any work starts whether the commit will be possible, `manifest` says what a
directory sends, `copies` what the Hub has already, `files` what it holds afterwards, `publication` puts
them together; `rights` asks whether the base's licence and gate allow it. Endpoint, cache and
token are huggingface_hub's own settings (HF_ENDPOINT, HF_HOME, HF_TOKEN): a token is never a parameter
here, and no message holds one.
"""

from bake.hub.access import Destination, check_access
from bake.hub.identity import check_id, identify_base
from bake.hub.publication import Publication, publish, verify_arrival
from bake.hub.rights import check_rights

__all__ = [
    "Destination",
    "Publication",
    "check_access",
    "check_id",
    "check_rights",
    "identify_base",
    "publish",
    "verify_arrival",
]
