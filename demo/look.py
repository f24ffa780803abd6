"""How the page looks. Fonts are those of the reader's system: nothing is fetched from elsewhere."""

from gradio import themes

_SANS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "monospace"]

CSS = """
:root{--heat:37 99 235}
.dark{--heat:96 165 250}
.gradio-container,.gradio-container>main{max-width:76rem!important;width:100%!important;margin:0 auto!important}
#title h1{font-size:1.4rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
#title p{color:var(--body-text-color-subdued);margin:.1rem 0 0}
#chat .minimal-audio-player{height:3.4rem;overflow:hidden}
#chat .message-buttons{display:none}
#chat .user .message img,#chat .user .message video{max-height:12rem;width:auto;border-radius:.4rem}
#chat .message-content .md{white-space:pre-wrap;overflow-wrap:anywhere}
#below{align-items:center;gap:.8rem}
#anew{max-width:11rem;margin-left:auto}
#experts h2{font-size:1.05rem;line-height:1.4;margin:0 0 .2rem}
#title .html-container,#experts .html-container{padding:0}
#box .submit-button{background:var(--primary-600);color:#fff}
#experts h3{font-size:.92rem;margin:.7rem 0 .1rem;text-transform:capitalize}
#experts .note{color:var(--body-text-color-subdued);font-size:.86rem;margin:0 0 .3rem;max-width:34rem}
#experts .wide{overflow-x:auto}
#experts table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.84rem;margin:0;width:auto}
#experts :is(table,thead,tbody,tr,th,td){border:0!important}
#experts td{min-width:2.4rem;height:1.7rem;text-align:center;padding:0 .15rem;
  border:1px solid var(--background-fill-primary)!important}
#experts th{background:none;font-weight:500;color:var(--body-text-color-subdued);padding:0 .6rem 0 0;text-align:right;
  white-space:nowrap;font-size:.78rem}
#experts thead th{text-align:center;padding:.1rem}
#experts .strong{color:#fff}
.dark #experts .strong{color:#0b1220}
#experts .wide+.note{margin-top:.5rem}
footer{display:none!important}
@media(min-width:64rem){#experts{max-height:calc(100vh - 7rem);overflow-y:auto}}
@media(max-width:40rem){
  .gradio-container .main.app{padding:.7rem .6rem!important}
  #chat{height:58vh!important}
  #chat .example{padding:.5rem .7rem!important}
}
"""


def theme() -> themes.Base:
    """Gradio's plain theme in our colours."""
    made = themes.Default(
        primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=_SANS, font_mono=_MONO, radius_size="lg"
    )
    return made.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
