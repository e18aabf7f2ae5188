"""Where a push can go: from a config alone, the layers, slots and routes, each proven on a twin."""

from bake.anatomy.choice import Anatomy
from bake.anatomy.examination import examine
from bake.anatomy.routes import SiteRoute
from bake.anatomy.twin import TwinVerdict

__all__ = ["Anatomy", "SiteRoute", "TwinVerdict", "examine"]
