"""Where a push can go: from a config alone, the layers, slots and routes, each proven on a twin."""

from bake.anatomy.routes import Anatomy, SiteRoute, examine
from bake.anatomy.twin import TwinVerdict

__all__ = ["Anatomy", "SiteRoute", "TwinVerdict", "examine"]
