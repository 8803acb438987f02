"""How a run is shown to people: lines, and a live panel."""
