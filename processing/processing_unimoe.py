"""The processor: messages or text with images, videos and audio in, tensors for `UniMoeForCausalLM` out.

Every medium has one placeholder in the text, which is expanded to as many tokens as the medium has features:
`<image>` and `<video>` to themselves, `<audio>` to `<audio>` for the speech branch and then `<sound>` for the sound
branch. `mm_token_type_ids` says what every position is: 0 text, 1 image, 2 video, 3 speech, 4 sound.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .auxiliary_inputs_unimoe import aux_inputs
from .call_options_unimoe import (
    counts_per_text,
    is_batched,
    media_items,
    merge_options,
    messages_of,
    prompts_of,
    template_call_options,
)
from .chat_templates_unimoe import DEFAULT_CHAT_TEMPLATE, VICUNA_CHAT_TEMPLATE
from .chat_unimoe import (
    MEDIA_KINDS,
    MEDIA_TOKENS,
    ChatEncoder,
    choose_template,
    placeholder_id,
    prepare_tokenizer,
    read_messages,
)
from .feature_extraction_unimoe import UniMoeFeatureExtractor
from .media_inputs_unimoe import check_token_counts, process_media, waiting_runs
from .media_policy_unimoe import DEFAULT_POLICY, ConversationError, MediaPolicy, PlaceholderError
from .original_chat_unimoe import build_encoder, needs_answer
from .placeholders_unimoe import Sample, check_all_used, expand, pad, to_tensors, truncate, with_labels
from .processor_parts_unimoe import PARTS, PresentParts, check_settings, forget_code_of_processor, load_parts
from .sound_tracks_unimoe import with_sound_tracks
from .video_processing_unimoe import UniMoeVideoProcessor

__all__ = ["DEFAULT_CHAT_TEMPLATE", "VICUNA_CHAT_TEMPLATE", "UniMoeProcessor", "prepare_tokenizer"]


class UniMoeProcessor(ProcessorMixin):
    """Prepares any mix of text, images, videos and audio.

    Args:
        image_processor: any image processor that makes `pixel_values` [n, 3, H, W]; None: no images.
        video_processor: `UniMoeVideoProcessor` or None.
        feature_extractor: `UniMoeFeatureExtractor` or None.
        tokenizer: required; must know the placeholder tokens used, see `prepare_tokenizer`.
        chat_template: Jinja source, or several by name; None: `DEFAULT_CHAT_TEMPLATE`.
        image_tokens, video_tokens: features per image and per video.
        speech_tokens, sound_tokens: features per audio window in either branch; 0: the branch does not exist.
        tokenization: "plain"; "spaced", the token ids of released Uni-MoE checkpoints, see `ChatEncoder`; those that
            begin with "original": ids and labels of the original code with its faults, see `build_encoder`.
        image_aspect_ratio: "square" leaves the shape of pictures to the image processor; "pad" first puts each in the
            middle of a square of the image processor's mean colour. Frames of videos are left as they are.
        image_antialias: false stretches pictures to the image processor's size without smoothing, see `stretched`.
        aux_maps: how pictures of segments become pixels: "picture", as photos; "released", see `map_pixels`.

    Attributes:
        media_policy: where media may come from and how big they may be; not saved with the processor.
        padding_side: "left" for generation; `training_inputs` pads right unless told otherwise.

    Raises:
        PlaceholderError, OptionError: a token count or a setting is impossible, or the tokenizer lacks a placeholder.
    """

    padding_side = "left"
    get_attributes = PresentParts()

    def __init__(
        self,
        image_processor: Any = None,
        video_processor: UniMoeVideoProcessor | None = None,
        feature_extractor: UniMoeFeatureExtractor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_tokens: int = 0,
        video_tokens: int = 0,
        speech_tokens: int = 0,
        sound_tokens: int = 0,
        tokenization: str = "plain",
        image_aspect_ratio: str = "square",
        aux_maps: str = "picture",
        image_antialias: bool = True,
    ) -> None:
        # Not the inherited __init__: it wants every part to be there, and real torchvision for the video one.
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"UniMoeProcessor needs a tokenizer, got {type(tokenizer).__name__}.")
        parts = (image_processor, video_processor, feature_extractor, tokenizer)
        for name, part in zip(PARTS, parts, strict=True):
            if part is not None:
                setattr(self, name, part)
        tokenizer.padding_side = self.padding_side  # pipelines, which make their batches themselves, ask it
        self.chat_template = chat_template or DEFAULT_CHAT_TEMPLATE
        self.image_tokens, self.video_tokens = image_tokens, video_tokens
        self.speech_tokens, self.sound_tokens = speech_tokens, sound_tokens
        self.tokenization, self.aux_maps = tokenization, aux_maps
        self.image_aspect_ratio, self.image_antialias = image_aspect_ratio, image_antialias
        check_settings(self)
        self.media_policy = DEFAULT_POLICY
        self._encoders: dict[tuple[str, int, str], ChatEncoder] = {}
        self.image_token, self.video_token, self.audio_token, self.sound_token = MEDIA_TOKENS
        check_token_counts(self)
        self.image_token_id = placeholder_id(tokenizer, self.image_token, image_tokens)
        self.video_token_id = placeholder_id(tokenizer, self.video_token, video_tokens)
        # Every clip has one <audio> in the text, also where only the sound branch exists.
        self.audio_token_id = placeholder_id(tokenizer, self.audio_token, speech_tokens + sound_tokens)
        self.sound_token_id = placeholder_id(tokenizer, self.sound_token, sound_tokens)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Process prompts whose placeholders are already in the text, as templates write them.

        The text is trusted: control tokens in it act. For text from users call `apply_chat_template`.

        Args:
            images, videos, audio: media for the placeholders, in order; flat, or one list per text, counted per text.
            text: a prompt or a list of prompts; None: only the media are processed.
            **kwargs: padding (True), padding_side, pad_to_multiple_of, truncation, max_length, return_tensors,
                add_special_tokens; `sampling_rate` of audio arrays; `images_kwargs`, `videos_kwargs`, `audio_kwargs`.

        Raises:
            PlaceholderError: other numbers of media than of placeholders, or a limit that cuts a medium's features.
            MediaError, OptionError, ConversationError: a medium, an option or a text is refused.
        """
        options = merge_options(kwargs)
        prompts = [] if text is None else prompts_of(text)
        given = dict(zip(MEDIA_KINDS, (images, videos, audio), strict=True))
        media = media_items(given, options.get("sampling_rate"))
        if text is None and not media:
            raise ValueError("UniMoeProcessor needs text or media, got neither.")
        counts = counts_per_text(given, len(prompts)) if prompts else {}
        tensors, waiting = process_media(self, media, options, self.media_policy)
        if text is None:
            return BatchFeature(tensors)
        samples = []
        for index, prompt in enumerate(prompts):
            bos = self.tokenizer.bos_token
            special = options.get("add_special_tokens", not (bos and prompt.startswith(bos)))
            ids = self.tokenizer.encode(prompt, add_special_tokens=special)
            own = {kind: [waiting[kind].pop(0) for _ in range(numbers[index])] for kind, numbers in counts.items()}
            sample = expand(ids, [False] * len(ids), self._kinds, {**waiting, **own}, f"text {index}")
            check_all_used(own, f"text {index}")
            samples.append({name: sample[name] for name in ("input_ids", "mm_token_type_ids")})
        check_all_used(waiting, "the texts")
        return self._batch(samples, tensors, options)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        media_root: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render one conversation or a list of them, and with `tokenize=True` process their media too.

        Contents are strings or lists of items {"type": "text", "text": ...}, {"type": "image", "image": PIL | array |
        bytes | path} (also under "path", "url", "base64"), likewise "video" and "audio"; audio items take
        "sampling_rate" (for arrays) and "encoder": "speech", "sound" or "both". Control tokens in texts stay text.
        A video with "sound_track": True is two media, its sound and its pictures; with load_audio_from_video so is
        each that has a sound track.

        Returns:
            `tokenize=False`: the prompt(s), unescaped. Else the input_ids, or with `return_dict` a BatchFeature with
            input_ids, attention_mask, mm_token_type_ids [B, S] and, as far as given, pixel_values [n, 3, H, W],
            pixel_values_videos [n, F, 3, H, W], speech_features, audio_features, audio_padding_mask (all media of the
            batch in order), aux_input_ids and the like; with `return_assistant_tokens_mask` also assistant_masks [B, S].

        Raises:
            ConversationError, MediaError, PlaceholderError: the message names conversation, message and content.
        """
        sound_tracks = kwargs.pop("load_audio_from_video", False) and self.feature_extractor is not None
        options = template_call_options(kwargs, processor_kwargs, return_tensors)
        encoder = self._encoder(chat_template)
        if return_assistant_tokens_mask and not encoder.marks_answers:
            raise ConversationError("The chat template has no {% generation %} block to tell answers apart.")
        template_options = {
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **kwargs,
        }
        batched, policy = is_batched(conversation), self.media_policy.rooted(media_root)
        conversations = [messages_of(one) for one in (conversation if batched else [conversation])]
        if sound_tracks:
            conversations = [with_sound_tracks(messages, policy) for messages in conversations]
        if not tokenize:
            prompts = [
                encoder.render(read_messages(one, policy.limits)[0], **template_options)[0] for one in conversations
            ]
            return prompts if batched else prompts[0]
        samples, tensors = self._process_conversations(conversations, encoder, template_options, options, policy)
        if not return_assistant_tokens_mask:
            samples = [{k: v for k, v in sample.items() if k != "assistant_masks"} for sample in samples]
        output = self._batch(samples, tensors, options)
        return output if return_dict else output["input_ids"]

    def training_inputs(
        self,
        conversations: list[list[dict[str, Any]]],
        media_root: str | None = None,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
        max_length: int | None = None,
    ) -> BatchFeature:
        """A training batch: as `apply_chat_template(..., return_dict=True)`, with `labels` [B, S].

        Labels are the input ids on answers of the assistant, including the token that ends each, and -100 elsewhere.
        `media_root` is the folder that relative paths start from and no path may leave; `max_length` cuts long texts
        at the end and raises where that would cut a medium.

        Raises:
            ConversationError: also where a conversation has no answer to learn from, or where there is none.
            OptionError: an option has an impossible value.
        """
        if not conversations:
            raise ConversationError("training_inputs needs one conversation at least, got none.")
        given = {"padding_side": padding_side, "pad_to_multiple_of": pad_to_multiple_of, "max_length": max_length}
        options = merge_options({**given, "return_tensors": return_tensors, "truncation": max_length is not None})
        policy = self.media_policy.rooted(media_root)
        samples, tensors = self._process_conversations(conversations, self._encoder(None), {}, options, policy)
        strict = needs_answer(self.tokenization)
        labelled = [with_labels(sample, f"conversation {index}", strict) for index, sample in enumerate(samples)]
        return self._batch(labelled, tensors, options)

    def tokenize_conversation(
        self, messages: list[dict[str, Any]], audio_windows: list[int] | None = None
    ) -> dict[str, list[int]]:
        """`input_ids`, `labels` and `mm_token_type_ids` of one conversation (lists), without opening its media.

        For training from cached tower states. `audio_windows` holds the number of windows per audio item; None: one
        each. Make batches of the results with `pad_tokens`.
        """
        plain, media = read_messages(messages, self.media_policy.limits)
        clips = [item for item in media if item.kind == "audio"]
        windows = [1] * len(clips) if audio_windows is None else list(audio_windows)
        if len(windows) != len(clips):
            raise PlaceholderError(f"audio_windows has {len(windows)} entries for {len(clips)} audio items.")
        encoded = self._encoder(None).encode(plain)
        waiting = waiting_runs(self, media, iter(windows))
        sample = expand(encoded.input_ids, encoded.answer, self._kinds, waiting, "the conversation")
        check_all_used(waiting, "the conversation")
        return with_labels(sample, "the conversation", needs_answer(self.tokenization))

    def pad_tokens(
        self,
        samples: Sequence[Mapping[str, Sequence[int]]],
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = "pt",
        length: int = 0,
    ) -> dict[str, Any]:
        """One batch of results of `tokenize_conversation`, int64 [B, S] each, with `attention_mask`.

        S is the longest sample's, or `length` if that is more, rounded up to the multiple.
        """
        return to_tensors(pad(samples, self.padding_id, padding_side, pad_to_multiple_of, length), return_tensors)

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything this processor can give to the model."""
        names = ["input_ids", "attention_mask", "mm_token_type_ids"]
        for part in (getattr(self, name, None) for name in PARTS[:3]):
            names += [] if part is None else part.model_input_names
        return names

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the parts that the model does not take."""
        return ["windows_per_clip"]

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, audio_lengths: Sequence[int] | None = None, **_: Any
    ) -> MultiModalData:
        """Tokens per medium, for serving engines; audio_lengths in samples at the feature extractor's rate."""
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            counts["num_image_tokens"] = [self.image_tokens] * len(image_sizes)
            counts["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None:
            counts["num_video_tokens"] = [self.video_tokens] * len(video_sizes)
        if audio_lengths is not None:
            windows = [self.feature_extractor.count_windows(samples) for samples in audio_lengths]
            counts["num_audio_tokens"] = [n * (self.speech_tokens + self.sound_tokens) for n in windows]
        return MultiModalData(**counts)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """The parts, in the order of `PARTS`; those that were not saved are None."""
        return load_parts(pretrained_model_name_or_path, processor_dict or {}, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the code goes along, so that the folder loads where unimoe is not installed."""
        before = UniMoeProcessor._auto_class
        UniMoeProcessor._auto_class = "AutoProcessor"  # type: ignore[assignment]
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            UniMoeProcessor._auto_class = before
            forget_code_of_processor(vars(self), *(vars(getattr(self, name)) for name in self.get_attributes()))

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds; without the tokenizer and the caches."""
        encoders, self._encoders = self._encoders, {}
        try:
            saved = super().to_dict()
            forget_code_of_processor(*(saved.get(name) or {} for name in PARTS[:3]))
            return saved
        finally:
            self._encoders = encoders

    @property
    def _kinds(self) -> dict[int, str]:
        """Placeholder id -> kind of medium; a lone `<sound>` is nothing that a text may hold."""
        ids = (self.image_token_id, self.video_token_id, self.audio_token_id, self.sound_token_id)
        return {i: kind for i, kind in zip(ids, (*MEDIA_KINDS, "sound"), strict=True) if i is not None}

    @property
    def padding_id(self) -> int:
        """The token in places of padding; any does, as padding is masked out of attention, loss and media."""
        tokenizer = self.tokenizer
        return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def _encoder(self, template: str | None) -> ChatEncoder:
        source = choose_template(self.chat_template, template)
        key = (source, len(self.tokenizer), self.tokenization)
        if key not in self._encoders:
            if len(self._encoders) >= 8:  # templates may come with every call
                self._encoders.clear()
            self._encoders[key] = build_encoder(self.tokenizer, source, self.tokenization)
        return self._encoders[key]

    def _process_conversations(
        self,
        conversations: Sequence[Any],
        encoder: ChatEncoder,
        template_options: dict[str, Any],
        options: dict[str, Any],
        policy: MediaPolicy,
    ) -> tuple[list[Sample], dict[str, Any]]:
        """Token lists (with assistant_masks) per conversation, and the tensors of all their media."""
        read = [
            read_messages(messages, policy.limits, f"conversation {index}, " if len(conversations) > 1 else "")
            for index, messages in enumerate(conversations)
        ]
        encoded = [encoder.encode(plain, **template_options) for plain, _ in read]
        tensors, waiting = process_media(self, [item for _, media in read for item in media], options, policy)
        tensors |= aux_inputs(self, [media for _, media in read], policy, options.get("return_tensors"))
        samples = []
        for index, (chat, (_, media)) in enumerate(zip(encoded, read, strict=True)):
            own = {kind: [waiting[kind].pop(0) for item in media if item.kind == kind] for kind in MEDIA_KINDS}
            samples.append(expand(chat.input_ids, chat.answer, self._kinds, own, f"conversation {index}"))
            check_all_used(own, f"conversation {index}")
        return samples, tensors

    def _batch(self, samples: list[Sample], tensors: dict[str, Any], options: dict[str, Any]) -> BatchFeature:
        max_length = options.get("max_length")
        if options.get("truncation") and max_length:
            side = self.tokenizer.truncation_side
            samples = [truncate(sample, max_length, side, f"sample {index}") for index, sample in enumerate(samples)]
        padding = options.get("padding", True)
        if padding in (False, "do_not_pad"):
            batch = {name: [sample[name] for sample in samples] for name in samples[0]}
            batch["attention_mask"] = [[1] * len(row) for row in batch["input_ids"]]
        else:
            side = options.get("padding_side") or self.padding_side
            length = max_length if padding == "max_length" and max_length else 0
            batch = pad(samples, self.padding_id, side, options.get("pad_to_multiple_of"), length)
        if options.get("return_mm_token_type_ids") is False:
            del batch["mm_token_type_ids"]
        return BatchFeature({**to_tensors(batch, options.get("return_tensors")), **tensors})
