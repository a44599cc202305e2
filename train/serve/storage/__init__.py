"""Stores the server's state: the SQLite ledger, results, and folders of files."""
