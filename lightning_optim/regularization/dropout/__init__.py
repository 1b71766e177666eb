"""Drop values: layers, places of a model that have dropout, rates that change."""
