"""Tasks: where prompts, demonstrations and preferences come from, and what is known of the truth."""
