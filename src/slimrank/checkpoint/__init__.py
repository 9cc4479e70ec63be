"""The folder on disk: what a loader needs, and how it is written, checked and read."""

from slimrank.checkpoint.aligned import align_folder
from slimrank.checkpoint.card import model_card
from slimrank.checkpoint.config import (
    QUANT_METHOD,
    LowRankConfig,
    LowRankLinearConfig,
    RoundedLinearConfig,
)
from slimrank.checkpoint.contents import FolderContents, read_folder
from slimrank.checkpoint.derived import write_derived
from slimrank.checkpoint.finished import FinishedBlock
from slimrank.checkpoint.folder import (
    CARD,
    HEALING,
    QUANTIZATION,
    RECIPE,
    REPORT,
    compare_with_folder,
    read_healing,
    read_quantization,
    read_report,
    write_folder,
)
from slimrank.checkpoint.foreign import reason, told_as
from slimrank.checkpoint.heal_state import (
    UNFINISHED_HEALING,
    HealRun,
    HealSnapshot,
    HealState,
)
from slimrank.checkpoint.loading import LOAD_ERRORS, load
from slimrank.checkpoint.manifest import RunManifest
from slimrank.checkpoint.mapped_folder import load_mapped, map_over
from slimrank.checkpoint.other_files import copy_other_files, copy_weights
from slimrank.checkpoint.passing import renamed_when_done, require_writable
from slimrank.checkpoint.profile import (
    Profile,
    ProfiledLinear,
    ProfileManifest,
    read_profile,
    require_space,
)
from slimrank.checkpoint.quantizer import LowRankQuantizer, mark_compressed, register
from slimrank.checkpoint.remote_code import (
    REMOTE_CODE,
    add_remote_code,
    has_remote_code,
    require_served_by_code,
)
from slimrank.checkpoint.size import (
    SHARD_SIZE,
    folder_bytes,
    read_headers,
    safetensors_bytes,
    weight_file_bytes,
)
from slimrank.checkpoint.sound import (
    TRUSTED,
    own_file,
    own_weight_files,
    require_sound,
    require_sound_config,
)
from slimrank.checkpoint.state import (
    UNFINISHED_RUN,
    RunState,
    removed_what_is_left,
)
from slimrank.checkpoint.unfinished import state_folder

__all__ = [
    "CARD",
    "HEALING",
    "LOAD_ERRORS",
    "QUANTIZATION",
    "QUANT_METHOD",
    "RECIPE",
    "REMOTE_CODE",
    "REPORT",
    "SHARD_SIZE",
    "TRUSTED",
    "UNFINISHED_HEALING",
    "UNFINISHED_RUN",
    "FinishedBlock",
    "FolderContents",
    "HealRun",
    "HealSnapshot",
    "HealState",
    "LowRankConfig",
    "LowRankLinearConfig",
    "LowRankQuantizer",
    "Profile",
    "ProfileManifest",
    "ProfiledLinear",
    "RoundedLinearConfig",
    "RunManifest",
    "RunState",
    "add_remote_code",
    "align_folder",
    "compare_with_folder",
    "copy_other_files",
    "copy_weights",
    "folder_bytes",
    "has_remote_code",
    "load",
    "load_mapped",
    "map_over",
    "mark_compressed",
    "model_card",
    "own_file",
    "own_weight_files",
    "read_folder",
    "read_headers",
    "read_healing",
    "read_profile",
    "read_quantization",
    "read_report",
    "reason",
    "register",
    "removed_what_is_left",
    "renamed_when_done",
    "require_served_by_code",
    "require_sound",
    "require_sound_config",
    "require_space",
    "require_writable",
    "safetensors_bytes",
    "state_folder",
    "told_as",
    "weight_file_bytes",
    "write_derived",
    "write_folder",
]
