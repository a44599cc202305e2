"""The processes of a run: how they join, how one hears of the others, and how all of them end."""
