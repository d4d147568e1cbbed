"""Hydra finds this folder by its name; it makes the config groups of `merge_callback` known to every Hydra app."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class MergeCallbackSearchPath(SearchPathPlugin):
    """Puts the groups ``callbacks/merge`` and ``hydra/callbacks`` behind the app's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="merge_callback", path="pkg://merge_callback.conf")
