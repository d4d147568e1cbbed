"""A Hydra plugin, found by the name of its folder, that gives every Hydra app the config groups of `merge_callback`."""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class MergeCallbackSearchPath(SearchPathPlugin):
    """Adds the groups ``callbacks/merge`` and ``hydra/callbacks`` to the search path, after the app's own groups."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # A folder, not a package: Hydra would import the package, and with it torch and Lightning, into every app.
        spec = find_spec("merge_callback")
        assert spec is not None
        assert spec.origin is not None
        search_path.append(provider="merge_callback", path=f"file://{Path(spec.origin).parent / 'apps' / 'conf'}")
