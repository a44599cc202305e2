"""Questions of the SQL task: schemas, what their databases hold, queries and their phrasings."""
