"""The layers and the bookkeeping that several models share."""
