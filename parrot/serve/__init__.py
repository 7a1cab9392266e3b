"""ServeCore: sessions, semantic variables, the DAG of calls, global scheduling; and its aiohttp shell."""
