"""The scoreboard: published and own runs against predictions."""
