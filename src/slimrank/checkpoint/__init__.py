"""The folder on disk: what a loader needs, and how it is written, checked and read."""

from slimrank.checkpoint.config import QUANT_METHOD, LowRankConfig, LowRankLinearConfig
from slimrank.checkpoint.contents import FolderContents, read_folder
from slimrank.checkpoint.folder import read_report, write_folder
from slimrank.checkpoint.loading import LOAD_ERRORS, load
from slimrank.checkpoint.passing import renamed_when_done, require_writable
from slimrank.checkpoint.profile import (
    Profile,
    ProfiledLinear,
    ProfileManifest,
    read_profile,
    require_space,
)
from slimrank.checkpoint.quantizer import LowRankQuantizer, mark_compressed, register
from slimrank.checkpoint.size import (
    folder_bytes,
    read_headers,
    safetensors_bytes,
    weight_file_bytes,
)
from slimrank.checkpoint.state import (
    FinishedBlock,
    RunManifest,
    RunState,
    has_run,
    require_no_run,
    state_folder,
)

__all__ = [
    "LOAD_ERRORS",
    "QUANT_METHOD",
    "FinishedBlock",
    "FolderContents",
    "LowRankConfig",
    "LowRankLinearConfig",
    "LowRankQuantizer",
    "Profile",
    "ProfileManifest",
    "ProfiledLinear",
    "RunManifest",
    "RunState",
    "folder_bytes",
    "has_run",
    "load",
    "mark_compressed",
    "read_folder",
    "read_headers",
    "read_profile",
    "read_report",
    "register",
    "renamed_when_done",
    "require_no_run",
    "require_space",
    "require_writable",
    "safetensors_bytes",
    "state_folder",
    "weight_file_bytes",
    "write_folder",
]
