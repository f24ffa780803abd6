"""The starter corpus: real pictures, speech, sounds, videos and text about everyday things, and its builder."""
