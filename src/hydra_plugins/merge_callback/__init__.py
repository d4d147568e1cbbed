"""Hydra finds this folder by its name; it makes the config groups of `merge_callback` known to every Hydra app."""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class MergeCallbackSearchPath(SearchPathPlugin):
    """Puts the groups ``callbacks/merge`` and ``hydra/callbacks`` behind the app's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # By its folder: to find a package's, Hydra would import it, and torch and Lightning into every app.
        spec = find_spec("merge_callback")
        assert spec is not None
        assert spec.origin is not None
        search_path.append(provider="merge_callback", path=f"file://{Path(spec.origin).parent / 'apps' / 'conf'}")
