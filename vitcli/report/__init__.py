"""What a person looks at: progress, tables, pictures. Nothing here decides anything."""
