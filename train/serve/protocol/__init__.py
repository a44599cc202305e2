"""The protocol between engine and routes: requests, results, and the engine's methods."""
