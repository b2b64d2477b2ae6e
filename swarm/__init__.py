"""swarm: run and fine-tune large language models on volunteers' machines as if they were local."""
