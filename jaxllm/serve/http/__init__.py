"""HTTP in front of the engine: the routes of OpenAI's API, bounded everywhere."""
